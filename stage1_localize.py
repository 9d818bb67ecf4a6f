"""Stage 1, perceive: supervised fine-tuning on boxes (SpatialLadder, arXiv 2510.08531, section 4, stage 1).

The model is asked for named objects of one picture and answers with a JSON list of boxes and labels. The loss is on the
answer only. What we do differently from the reference:
1. the answer is dumped to JSON once (theirs is an escaped string) and the prompt carries no loss (theirs does);
2. boxes are pixels of the RESIZED picture, as Qwen2.5-VL was trained; the picture's own size is read, never assumed;
3. LoRA by default (the paper tunes all weights), so that the 3B model fits a 24 GB card;
4. several questions about one picture share its tokens (common.py, section 5).

    python stage1_localize.py                 # toy: about four and a half minutes on two cores, held-out IoU about 0.7
    python stage1_localize.py --preset 3b --data data/SpatialLadder-26k

Writes runs/<preset>/stage1: metrics.jsonl, samples.jsonl, curves.png, checkpoint/, model/ (and adapter/).
"""

from dataclasses import dataclass

import numpy as np

import common
from common import TrainSettings

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class LocalizeSettings(TrainSettings):
    """Stage 1 adds nothing to what the training stages share."""


PRESETS = {
    # The toy's language model starts from nothing, so all of it is trained, with Muon: AdamW needs three times as long.
    "toy": {
        "load": "fp32", "tune": "full", "keep_features": True, "optimizer": "muon", "lr": 1e-3, "muon_lr": 0.013,
        "steps": 690, "scenes": 32, "branches": 4, "micro_scenes": 64, "warmup": 0.05, "eval_every": 100, "save_every": 345,
    },
    # The paper: one epoch, 16 rows a step, 1e-5 for full tuning, pictures of 16 to 128 tokens.
    "3b": {
        "model": "Qwen/Qwen2.5-VL-3B-Instruct", "lr": 1e-4, "scenes": 16, "checkpointing": True, "batch": 16,
        "min_pixels": 16 * 28 * 28, "max_pixels": 128 * 28 * 28,
    },
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# 2. The idea: see before you reason
# ------------------------------------------------------------------------------------------------

NEW_TOKENS = 128  # of the longest answer


def localization_scores(backbone, scenes, batch=128, keep=False):
    """Greedy answers to the localisation rows of held-out scenes.

    Returns {"iou": mean IoU, "acc50": share of wanted boxes met with IoU >= 0.5} and the examples and texts.
    """
    examples, texts = common.generate_answers(backbone, scenes, "locate", NEW_TOKENS, batch=batch, keep=keep)
    overlaps = []
    for example, text in zip(examples, texts):
        predicted = common.match_boxes(common.parse_boxes(text), example.answer)
        overlaps += common.box_iou(predicted, [box["bbox_2d"] for box in example.answer]).tolist()
    return {"iou": float(np.mean(overlaps)), "acc50": float(np.mean(np.array(overlaps) >= 0.5))}, examples, texts


# ------------------------------------------------------------------------------------------------
# 3. The loop is common.sft; 4. Main
# ------------------------------------------------------------------------------------------------


@common.ending_together()
def main():
    """Read, adapt, train, write."""
    settings = common.parse_settings(LocalizeSettings, PRESETS, "stage1", before="base")
    common.start_processes(settings)
    folder, first_step = common.start_run(settings)
    backbone = common.load_backbone(
        settings.model, settings.load, settings.min_pixels, settings.max_pixels, common.device_name()
    )
    scenes = common.load_scenes(settings.data, ["locate"], backbone.processor)
    heldout = common.heldout_scenes(settings, ["locate"], backbone.processor)
    packs = common.make_packs(scenes, settings.branches, settings.seed)
    common.adapt(backbone, settings)

    def evaluate(backbone, step):
        scores, examples, texts = localization_scores(backbone, heldout, settings.batch, settings.keep_features)
        common.log_samples(folder, step, examples, texts)
        return scores

    panels = {"loss": ["loss"], "held-out boxes": ["iou", "acc50"], "gradient norm": ["grad_norm"]}
    common.sft(backbone, packs, settings, folder, first_step, evaluate, panels, NEW_TOKENS)
    common.save_run(backbone, folder)
    common.end_processes()


if __name__ == "__main__":
    main()
