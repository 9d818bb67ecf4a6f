"""Stage 1, see: supervised fine-tuning on boxes (SpatialLadder, arXiv 2510.08531, section 4, stage 1).

The model is asked for named objects in one picture and answers with a JSON list of boxes and labels. The toy also asks about
several pictures; then the answer names the picture of each box, too. Differences from the reference code:
1. the answer is dumped to JSON once (theirs is an escaped string), and the prompt carries no loss (theirs does);
2. boxes have the units in which the model was trained (Qwen2.5-VL: pixels of the RESIZED picture; Qwen3-VL: 0 to 1000); the
   size of each picture is read, never assumed;
3. LoRA by default (the paper tunes all weights), so that the 3B model fits a 24 GB card;
4. questions about the same picture share its tokens (common.py, section 5).

    python stage1_localize.py                 # toy: about twelve minutes on two cores
    python stage1_localize.py --preset 3b --data data/SpatialLadder-26k

Writes runs/<preset>/stage1: metrics.jsonl, samples.jsonl, curves.png, checkpoint.pt, model/ (and adapter/).
"""

import math
from dataclasses import dataclass

import numpy as np

import common
from support import memory, runs

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class LocalizeSettings(runs.TrainSettings):
    """Stage 1 adds nothing to what the training stages share."""


PRESETS = {
    # The toy's language model starts from random weights, so all of it is trained. Muon needs a third of AdamW's time.
    "toy": {
        "load": "fp32", "tune": "full", "keep_features": True, "optimizer": "muon", "lr": 1e-3, "muon_lr": 0.013,
        "steps": 700, "train_batch": 32, "branches": 4, "micro_batch": 8, "warmup": 0.05, "eval_every": 100, "save_every": 350,
    },
    # The paper: one epoch, 16 rows a step, learning rate 1e-5 for full tuning, pictures of 16 to 128 tokens. Here a step has 16
    # scenes, each with up to 8 of its rows.
    "3b": {
        "model": "Qwen/Qwen2.5-VL-3B-Instruct", "lr": 1e-4, "train_batch": 16, "checkpointing": True, "eval_batch": 16,
        "min_picture_tokens": 16, "max_picture_tokens": 128,
    },
}  # fmt: skip
NEW_TOKENS = 128  # of the longest answer

# ------------------------------------------------------------------------------------------------
# 2. Scores on held-out scenes
# ------------------------------------------------------------------------------------------------


def evaluate(backbone, scenes, settings, run):
    """Greedy answers to localisation questions: {"iou": mean IoU, "acc50": share of wanted boxes found with IoU >= 0.5}."""
    examples, texts = runs.generate_answers(
        backbone, scenes, "locate", NEW_TOKENS, eval_batch=settings.eval_batch, keep=settings.keep_features
    )
    run.log_samples(examples, texts)
    overlaps = []
    for example, text in zip(examples, texts):
        predicted = common.match_boxes(common.parse_boxes(text), example.answer)
        overlaps += common.box_iou(predicted, [box["bbox_2d"] for box in example.answer]).tolist()
    return {"iou": float(np.mean(overlaps)), "acc50": float(np.mean(np.array(overlaps) >= 0.5))}


# ------------------------------------------------------------------------------------------------
# 3. The loop
# ------------------------------------------------------------------------------------------------


def train(backbone, packs, held_out, settings, run):
    """Minimise the mean negative log-probability of the answers' tokens. packs: from common.make_packs."""
    if not packs:
        raise SystemExit(f"{settings.data} has nothing to learn for this stage.")
    memory.check_memory(backbone, settings, memory.pack_lengths(backbone, packs), NEW_TOKENS)
    steps = settings.steps or math.ceil(len(packs) / settings.train_batch)
    optimizers = runs.make_optimizers(backbone.model, settings)
    for step in run.steps(steps, backbone, optimizers):
        # The batch is the same in all processes; each works on its share of the scenes.
        batch = common.batch_at(packs, step, settings.train_batch, settings.seed)
        tokens = sum(len(answer) for pack in batch for _, answer in pack.pairs)  # answer tokens of the whole batch
        backbone.model.train()
        loss = 0.0
        for part in runs.micro_batches(batch, settings.micro_batch):
            prefixes = common.encode_scenes(backbone, [pack.scene for pack in part], settings.keep_features)
            logps, _, _ = common.branch_logprobs(backbone, prefixes, [pack.pairs for pack in part])  # (N, C), 0 at padding
            part_loss = -logps.sum() / tokens  # summed over all parts: the mean over the batch's answer tokens
            part_loss.backward()
            loss += part_loss.item()
        runs.all_reduce_gradients(backbone.model.parameters())
        grad_norm = runs.optimizer_step(backbone.model, optimizers, settings, step, steps)
        row = {"loss": runs.all_reduce([loss])[0], "grad_norm": grad_norm, "tokens": tokens}
        scores = evaluate(backbone, held_out, settings, run) if held_out and run.is_eval_step() else {}
        run.log(row, scores, [e for pack in batch for e in pack.scene.examples])


# ------------------------------------------------------------------------------------------------
# 4. Main
# ------------------------------------------------------------------------------------------------


def work(settings):
    """Load, train, save. Every process runs this."""
    if runs.is_finished(settings):
        return
    run = runs.Run(settings, {"loss": ["loss"], "held-out boxes": ["iou", "acc50"], "gradient norm": ["grad_norm"]})
    sizes = settings.min_picture_tokens, settings.max_picture_tokens
    backbone = common.load_backbone(settings.model, settings.load, *sizes, runs.device())
    scenes = runs.training_scenes(settings, ["locate"], backbone)
    held_out = runs.held_out_scenes(settings, ["locate"], backbone)
    packs = common.make_packs(backbone.tokenizer, scenes, settings.branches, settings.seed)
    common.adapt(backbone, settings)
    train(backbone, packs, held_out, settings, run)
    run.finish(backbone)


def main():
    """Read the settings and start the processes."""
    runs.launch(work, runs.parse_settings(LocalizeSettings, PRESETS, "stage1", before="base"), graceful=True)


if __name__ == "__main__":
    main()
