"""The pipeline of diffusers that an exported folder samples by; part of that folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from diffit_train.models.precision import arithmetic


class DiffiTPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class-conditional or unconditional images from a trained network.

    Args:
        transformer: the network.
        scheduler: its objective and sampler.
        vae: decodes latents; None for a network on pixels.
        id2label: names of the classes by number, as text; None for a network without labels.
        null_label: label of the unconditional passes of guidance.
        scale: factor that latents were multiplied by.
        pixels: round to the nearest level, or truncate.
        precision: arithmetic of the network: fp32, tf32 or bf16_autocast.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012  (as diffusers declares it)

    def __init__(  # type: ignore[no-untyped-def]
        self,
        transformer,
        scheduler,
        vae,
        id2label=None,
        null_label=0,
        scale=1.0,
        pixels="round",
        precision="fp32",
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=id2label,
            null_label=null_label,
            scale=scale,
            pixels=pixels,
            precision=precision,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | None = None,
        seeds: int | list[int] | range = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 16,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image per class and seed, seeds innermost; of a network without labels, per seed.

        An image depends on its class and seed only, but for rounding, and is the one that
        `diffit sample` makes.

        Args:
            class_labels: numbers or names of classes; None for a network without labels.
            seeds: of the noise, 0 or larger.
            num_inference_steps: of the sampler; None for the configured number.
            guidance_scale: None for the configured one.
            batch_size: images at once.
            output_type: `pil`, or `np` for (n, R, R, 3) float32 in [0, 1].

        Raises:
            ValueError: there is no such class, seed or output type.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type is {output_type!r}, but must be 'pil' or 'np'")
        numbers = [seeds] if isinstance(seeds, int) else list(seeds)
        if any(seed < 0 for seed in numbers):
            raise ValueError(f"seeds are {numbers}, but must be 0 or larger")
        wanted = [(label, seed) for label in self._labels(class_labels) for seed in numbers]
        made = []
        with self.progress_bar(total=len(wanted)) as progress:
            for start in range(0, len(wanted), batch_size):
                chunk = wanted[start : start + batch_size]
                made.append(self._images(chunk, num_inference_steps, guidance_scale))
                progress.update(len(chunk))
        levels = np.concatenate(made) if made else np.zeros((0, 0, 0, 3), np.uint8)
        images: Any = [Image.fromarray(image) for image in levels]
        if output_type == "np":
            images = levels.astype(np.float32) / 255.0
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _images(
        self, wanted: list[tuple[int, int]], steps: int | None, scale: float | None
    ) -> np.ndarray:
        """Images (B, R, R, 3), uint8, of labels and seeds."""
        device = self._execution_device

        def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with arithmetic(self.config.precision, device):
                return self.transformer(x, t, y).float()

        latents = self.scheduler.generate(
            network,
            self.transformer.input_shape,
            [seed for _, seed in wanted],
            torch.tensor([label for label, _ in wanted], device=device),
            self.config.null_label,
            steps,
            scale,
        )
        x = latents / self.config.scale
        if self.vae is not None:
            x = self.vae.decode(x.to(self.vae.dtype)).sample
        levels = (x.float() + 1.0) * 127.5
        levels = levels.round() if self.config.pixels == "round" else levels
        return levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _labels(self, wanted: int | str | list[int | str] | None) -> list[int]:
        names = self.config.id2label
        if names is None:
            if wanted is not None:
                raise ValueError(f"class_labels is {wanted!r}, but the network has no labels")
            return [0]
        if wanted is None:
            raise ValueError("class_labels is None; pass numbers or names, see config.id2label")
        numbers = {name: int(number) for number, name in names.items()}
        labels = []
        for one in [wanted] if isinstance(wanted, int | str) else wanted:
            label = numbers.get(one) if isinstance(one, str) else int(one)
            if label is None or not 0 <= label < len(names):
                raise ValueError(
                    f"class_labels has {one!r}, but must be a name or a number from 0 to "
                    f"{len(names) - 1}"
                )
            labels.append(label)
        return labels
