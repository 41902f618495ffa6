"""The baseline of times: diffusers on CPU torch, with the weights of a model.

Both are in the extra `parity`.
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

from diffjax.bench.models import BenchModel
from diffjax.interop import hub
from diffjax.nn.conditioning import ClassLabel


def is_available() -> bool:
    """Check whether torch and diffusers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))


def versions() -> str:
    """The versions, as in "diffusers 0.42.1, torch 2.14.0"."""
    names = ("diffusers", "torch")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


class DiffusersBaseline:
    """A `UNet2DModel` with diffusers' schedulers; methods return functions to time."""

    def __init__(self, model: BenchModel) -> None:
        """Convert the weights by `interop.hub`, as a user would.

        Raises: ValueError for a network that diffusers does not have.
        """
        torch, diffusers = (importlib.import_module(name) for name in ("torch", "diffusers"))
        self._torch: Any = torch
        self._diffusers: Any = diffusers
        diffusers.utils.logging.set_verbosity_error()
        torch.set_num_threads(os.cpu_count() or 1)
        with tempfile.TemporaryDirectory() as folder:
            hub.save(Path(folder), model.info, model.params, "raw", 0)
            self.model: Any = diffusers.UNet2DModel.from_pretrained(folder)
            self.scheduler: Any = diffusers.DDPMScheduler.from_pretrained(folder)
        self._config, self._x_shape = model.info.config, model.info.x_shape
        self._condition, conditioning = model.condition, model.info.conditioning
        self._classes = conditioning.classes if isinstance(conditioning, ClassLabel) else 0

    def forward(self, batch: int, dtype: str = "float32") -> Callable[[], Any]:
        """A forward pass, without a gradient."""
        model, x, labels = self._model(dtype), self._x(batch, dtype), self._labels(batch)
        t = self._torch.zeros(batch, dtype=self._torch.long)

        def run() -> Any:
            with self._torch.inference_mode():
                return model(x, t, labels).sample.float().numpy()

        return run

    def backward(self, batch: int) -> Callable[[], Any]:
        """A forward pass and the gradient of its mean square."""
        model, x, labels = self.model.train(), self._x(batch), self._labels(batch)
        t = self._torch.zeros(batch, dtype=self._torch.long)

        def run() -> None:
            model.zero_grad()
            model(x, t, labels).sample.square().mean().backward()

        return run

    def train_step(self, batch: int) -> Callable[[], Any]:
        """Noise, loss, gradient, clipping, AdamW and moving average."""
        torch, config = self._torch, self._config.train
        model, x, labels = self.model.train(), self._x(batch), self._labels(batch)
        parameters = [*model.parameters()]
        # Fused is the fastest of torch.
        optimizer = torch.optim.AdamW(
            parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        average = [p.detach().clone() for p in parameters]

        def run() -> None:
            eps, t = torch.randn_like(x), torch.randint(self._config.diffusion.T, (batch,))
            output = model(self.scheduler.add_noise(x, eps, t), t, labels).sample
            loss = torch.nn.functional.mse_loss(output, eps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - config.ema[0])

        return run

    def ddim(
        self, batch: int, steps: int, scale: float | None = None, dtype: str = "float32"
    ) -> Callable[[], Any]:
        """Samples by DDIM, eta 0, trailing.

        scale: of guidance, by one pass on twice the batch; None for none.
        """
        torch, model = self._torch, self._model(dtype)
        scheduler = self._diffusers.DDIMScheduler.from_config(
            self.scheduler.config, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(steps)
        x_T, labels = self._x(batch, dtype), self._labels(batch)
        both = (
            None if labels is None else torch.cat([labels, torch.full_like(labels, self._classes)])
        )

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

    def _x(self, batch: int, dtype: str = "float32") -> Any:
        r = np.random.default_rng(0)
        x = r.normal(size=(batch, *self._x_shape)).astype(np.float32).transpose(0, 3, 1, 2)
        return self._torch.from_numpy(x.copy()).to(getattr(self._torch, dtype))

    def _labels(self, batch: int) -> Any:
        if not self._classes:
            return None
        return self._torch.from_numpy(np.array(self._condition(batch), np.int64))
