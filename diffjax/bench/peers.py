"""diffusers on CPU torch, with the weights of a network of ours: what ours is timed beside (`pip install
diffjax[parity]`).
"""

import importlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.config import Config
from diffjax.interop import unet2d


def available() -> bool:
    """Whether torch and diffusers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))


def versions() -> str:
    """As in "diffusers 0.42.1, torch 2.14.0"."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "torch"))


class Peer:
    """A `UNet2DModel` and diffusers' schedulers, that do what the functions here of the same names do. Every method
    returns a function that does it once.
    """

    def __init__(self, config: Config, image_shape: tuple[int, int, int], classes: int, params: Any) -> None:
        """Weights go through `interop.diffusers`, as a user's would. ValueError for a network that diffusers lacks."""
        torch, theirs = importlib.import_module("torch"), importlib.import_module("diffusers")
        self._torch: Any = torch
        self._theirs: Any = theirs
        theirs.utils.logging.set_verbosity_error()
        torch.set_num_threads(os.cpu_count() or 1)
        with tempfile.TemporaryDirectory() as folder:
            unet2d.save(Path(folder), config, image_shape, classes, params, "raw", 0)
            self.model: Any = theirs.UNet2DModel.from_pretrained(folder)
            self.scheduler: Any = theirs.DDPMScheduler.from_pretrained(folder)
        self._image_shape, self._classes = image_shape, classes
        self._config = config

    def forward(self, batch: int, dtype: str = "float32") -> Callable[[], Any]:
        """One pass, without a gradient."""
        model, x, labels = self._model(dtype), self._images(batch, dtype), self._labels(batch)
        t = self._torch.zeros(batch, dtype=self._torch.long)

        def run() -> Any:
            with self._torch.inference_mode():
                return model(x, t, labels).sample.float().numpy()

        return run

    def backward(self, batch: int) -> Callable[[], Any]:
        """A pass and the gradient of its mean square."""
        model, x, labels = self.model.train(), self._images(batch), self._labels(batch)
        t = self._torch.zeros(batch, dtype=self._torch.long)

        def run() -> None:
            model.zero_grad()
            model(x, t, labels).sample.square().mean().backward()

        return run

    def train_step(self, batch: int) -> Callable[[], Any]:
        """Noise, loss, gradient, clipping, AdamW (fused, torch's fastest) and the moving average."""
        torch, config = self._torch, self._config.train
        model, x, labels = self.model.train(), self._images(batch), self._labels(batch)
        parameters = [*model.parameters()]
        optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True)
        average = [p.detach().clone() for p in parameters]

        def run() -> None:
            eps, t = torch.randn_like(x), torch.randint(self._config.diffusion.T, (batch,))
            said = model(self.scheduler.add_noise(x, eps, t), t, labels).sample
            loss = torch.nn.functional.mse_loss(said, eps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - config.ema[0])

        return run

    def ddim(self, batch: int, steps: int, scale: float | None = None, dtype: str = "float32") -> Callable[[], Any]:
        """Images by DDIM, eta 0, trailing; guided by one pass over twice the batch if there is a scale."""
        torch, model = self._torch, self._model(dtype)
        scheduler = self._theirs.DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        x_T, labels = self._images(batch, dtype), self._labels(batch)
        both = None if labels is None else torch.cat([labels, torch.full_like(labels, self._classes)])

        def run() -> np.ndarray:
            x = x_T
            with torch.inference_mode():
                for t in scheduler.timesteps:
                    if scale is None:
                        eps = model(x, t, labels).sample
                    else:
                        eps, null = model(torch.cat([x, x]), t, both).sample.chunk(2)
                        eps = null + scale * (eps - null)
                    # Else its eps would not be the one that the clipped x0 implies.
                    x = scheduler.step(eps, t, x, use_clipped_model_output=True).prev_sample
            return x.float().numpy().transpose(0, 2, 3, 1)

        return run

    def _model(self, dtype: str) -> Any:
        return self.model.eval().to(getattr(self._torch, dtype))

    def _images(self, batch: int, dtype: str = "float32") -> Any:
        r = np.random.default_rng(0)
        images = r.normal(size=(batch, *self._image_shape)).astype(np.float32).transpose(0, 3, 1, 2)
        return self._torch.from_numpy(images.copy()).to(getattr(self._torch, dtype))

    def _labels(self, batch: int) -> Any:
        return self._torch.arange(batch) % self._classes if self._classes else None
