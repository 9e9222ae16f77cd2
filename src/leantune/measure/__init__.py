"""The measurements take any torch model: bytes held, gradient error, time and peak of a step."""
