# /// script
# dependencies = ["hf-moe"]
# ///

"""CLIP-MoE from a dense CLIP: stages of contrastive learning make the experts, then the routers are tuned.

# All stages
```bash
python -m hf_moe.trainers.scripts.clip_moe \
    --model_name_or_path openai/clip-vit-large-patch14 \
    --dataset_name ./pictures-with-captions \
    --num_experts 4 \
    --stretch_positions \
    --per_device_train_batch_size 100 \
    --output_dir clip-moe
```
The data have a column of images and one of texts (`--image_column`, `--text_column`); a folder of pictures with a
`metadata.jsonl` of `{"file_name": "1.png", "text": "a caption"}` is such data. Finished stages are kept in
`--output_dir`; with `--resume_from_checkpoint True` an interrupted run goes on where it was. A stage has the square of
`--num_clusters` times as many clusters as the one before, and each has to fill a batch: small data want 2.

# Copies instead of stages, which the released code does by default
```bash
python -m hf_moe.trainers.scripts.clip_moe --experts copies --config clip-moe.yaml
```

# Several processes
```bash
accelerate launch --multi_gpu --num_processes 8 -m hf_moe.trainers.scripts.clip_moe --config clip-moe.yaml
hf-moe train clip-moe --config clip-moe.yaml --multi_gpu --num_processes 8
```
"""

import argparse
import os
from typing import Any


__all__ = ["check_columns", "load_clip", "main", "make_parser"]


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Trains with [`~hf_moe.trainers.train_clip_moe`] what the parsed arguments describe, and saves."""
    import hf_moe
    from hf_moe.trainers import ClipCollator, train_clip_moe
    from hf_moe.trainers.scripts.runner import load_splits

    if model_args.use_peft or model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError(
            "`--use_peft`, `--load_in_4bit` and `--load_in_8bit` must be left out: experts are made of the weights "
            "of whole feed-forwards."
        )
    if script_args.dataset_streaming:
        raise ValueError("`--dataset_streaming` must be left out: stages cluster all pairs of the data.")
    data = load_splits(script_args, training_args, dataset_args)
    for use, rows in data.items():
        if rows is not None:
            check_columns(rows, training_args.image_column, training_args.text_column, use)
    model, processor = load_clip(model_args)
    positions = model.config.text_config.max_position_embeddings
    if training_args.stretch_positions:
        positions = 20 + 4 * (positions - 20)
        processor.tokenizer.model_max_length = positions
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, positions)
    collator = ClipCollator(processor, training_args.image_column, training_args.text_column)
    trainer = train_clip_moe(model, training_args, **data, data_collator=collator, processing_class=processor)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub and trainer.is_world_process_zero():
        name = training_args.hub_model_id or os.path.basename(os.path.normpath(training_args.output_dir))
        hf_moe.push_to_hub(trainer.accelerator.unwrap_model(trainer.model), name, tokenizer=processor)
    trainer.end()


def check_columns(rows: Any, image: str, text: str, use: str) -> None:
    """Refuses data without images or texts, before anything is trained.

    Args:
        rows (`datasets.Dataset`): The data.
        image, text (`str`): Their columns.
        use (`str`): What they are for, for the message.

    Raises:
        ValueError: no rows, a column is missing, or the first row has something else in it.
    """
    if len(rows) == 0:
        raise ValueError(f"`{use}` has no rows.")
    for column, argument in ((image, "--image_column"), (text, "--text_column")):
        if column not in rows.column_names:
            raise ValueError(f"`{argument} {column}` is not in `{use}`, which has {rows.column_names}.")
    first = rows[0]
    if not isinstance(first[text], str):
        raise ValueError(
            f"`--text_column {text}` must hold one text per row, got {type(first[text]).__name__}. Give each caption "
            "a row of its own."
        )
    if isinstance(first[image], str | bytes | dict | None):
        raise ValueError(
            f"`--image_column {image}` must hold images, got {type(first[image]).__name__}. Cast it: "
            f"`dataset.cast_column({image!r}, datasets.Image())`."
        )


def load_clip(model_args: Any) -> tuple[Any, Any]:
    """The dense model and its processor.

    Raises:
        ValueError: another model than CLIP, a sparse one, or one without a processor.
    """
    from transformers import AutoConfig, AutoProcessor, CLIPModel

    name, options = model_args.model_name_or_path, {"revision": model_args.model_revision}
    if name is None:
        raise ValueError("`--model_name_or_path` is missing: a dense CLIP, from the Hub or a folder.")
    kind = AutoConfig.from_pretrained(name, **options).model_type
    if kind != "clip":
        raise ValueError(f"`--model_name_or_path {name}` must be a dense CLIP (`clip`), but is a `{kind}`.")
    try:
        processor = AutoProcessor.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"`--model_name_or_path {name}` has no processor for images and texts: {error}") from error
    if not all(hasattr(processor, part) for part in ("tokenizer", "image_processor")):
        raise ValueError(
            f"`--model_name_or_path {name}` has a {type(processor).__name__} alone, but CLIP needs a tokenizer and an "
            "image processor. Save both with `CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)`."
        )
    model: Any = CLIPModel.from_pretrained(
        name, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation, **options
    )
    return model.eval(), processor


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The script's `trl.TrlParser`."""
    from hf_moe.trainers import ClipMoeConfig
    from hf_moe.trainers.scripts.runner import make_script_parser

    return make_script_parser(ClipMoeConfig, "clip-moe", subparsers, prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
