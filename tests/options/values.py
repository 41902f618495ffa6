"""A value for every field of a configuration, none of them its default, as text and as it is.

Numbers of one type differ, so that none can be taken for another.
"""

DATA = {
    "data.source": ("folder", "folder"),
    "data.name": ("other", "other"),
    "data.dir": ("prepared", "prepared"),
    "data.path": ("photos", "photos"),
    "data.size": ("16", 16),
    "data.pad": ("3", 3),
    "data.grey": (None, True),
    "data.conditions": ("pose label", ("pose", "label")),
    "data.flip": (None, True),
    "data.skip-damaged": (None, True),
}
NETWORK = {
    "network.learned-variance": (None, True),
    "network.dropout": ("0.15", 0.15),
    "network.dtype": ("bfloat16", "bfloat16"),
    "network.remat": (None, True),
    "network.channels": ("24", 24),
    "network.multipliers": ("1 2 4", (1, 2, 4)),
    "network.blocks": ("5", 5),
    "network.attention": ("8 4", (8, 4)),
    "network.middle-attention": (False, False),
    "network.middle-attention-norm": (False, False),
    "network.heads": ("6", 6),
    "network.head-width": ("12", 12),
    "network.scale-shift": (False, False),
    "network.resample-blocks": (None, True),
    "network.symmetric-padding": (None, True),
    "network.norm-groups": ("4", 4),
    "network.norm-epsilon": ("0.002", 0.002),
    "network.sin-first": (None, True),
    "network.frequency-shift": ("0.5", 0.5),
}
DIFFUSION = {
    "diffusion.schedule": ("scaled_linear", "scaled_linear"),
    "diffusion.betas": ("0.01 0.3", (0.01, 0.3)),
    "diffusion.zero-terminal-snr": (None, True),
    "diffusion.T": ("30", 30),
    "diffusion.prediction": ("flow", "flow"),
    "diffusion.shift": ("1.5", 1.5),  # of the schedule flow, which has no betas
    "diffusion.time-scale": ("10.5", 10.5),
    "diffusion.sigma-data": ("0.75", 0.75),
}
TRAIN = {
    "train.steps": ("41", 41),
    "train.batch": ("144", 144),
    "train.learning-rate": ("0.25", 0.25),
    "train.warmup": ("11", 11),
    "train.decay": ("none", "none"),
    "train.weight-decay": ("0.35", 0.35),
    "train.clip": ("2.5", 2.5),
    "train.ema": ("0.7 0.6", (0.7, 0.6)),
    "train.power-ema": ("0.06 0.12", (0.06, 0.12)),
    "train.weighting": ("edm", "edm"),
    "train.times": ("log_normal", "log_normal"),
    "train.times-mean": ("-0.55", -0.55),
    "train.times-std": ("0.65", 0.65),
    "train.condition-dropout": ("0.45", 0.45),
    "train.seed": ("123", 123),
    "train.accumulate": ("9", 9),
    "train.parallel": ("jit", "jit"),
    "train.steps-per-dispatch": ("13", 13),
    "train.max-skipped": ("17", 17),
    "train.log-every": ("19", 19),
    "train.eval-every": ("23", 23),
    "train.preview-every": ("29", 29),
    "train.save-every": ("31", 31),
    "train.keep": ("37", 37),
}


def words_from(values):
    """The options with their values; None is a flag, False its negation."""
    words = []
    for name, (text, _) in values.items():
        part, dot, rest = name.rpartition(".")
        words.append(f"--{part}{dot}no-{rest}" if text is False else f"--{name} {text or ''}")
    return " ".join(words)
