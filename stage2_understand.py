"""Stage 2, understand: supervised fine-tuning on spatial questions (SpatialLadder, arXiv 2510.08531, section 4, stage 2).

Seven types of questions over one picture, several views, or a video, answered directly with a letter or a number. The
loss is on the answer only. What we do differently from the reference:
1. video frames are put in temporal order (the released rows hold them in string order);
2. all questions about the same pictures are branches of one prefix: about nine a video, paid for once;
3. localisation rows of stage 1 may be replayed (--replay), for a model that would forget its boxes: a small one does;
4. THE TOY MIXES IN WORKED ANSWERS: boxes, then the comparison, then the answer. From direct answers alone a model this
   small learns relations hardly better than a guess; and from worked ones it does. The paper's data has none, --worked 0
   leaves them out, and they are asked for in other words (INSTRUCTIONS in common.py), so that direct answers stay what
   they are.

    python stage2_understand.py               # toy: about five minutes on two cores
    python stage2_understand.py --preset 3b --data data/SpatialLadder-26k

Writes runs/<preset>/stage2: metrics.jsonl, samples.jsonl, curves.png, checkpoint/, model/ (and adapter/).
"""

import random
from dataclasses import dataclass

import common
from common import TrainSettings, setting

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class UnderstandSettings(TrainSettings):
    """Stage 2. Each share is of the rows in the data: 0 = none, 1 = all, in between = drawn once."""

    direct: float = setting(1.0, "share of the spatial rows, answered directly; 0: none")
    worked: float = setting(0.0, "share of the toy's worked answers")
    replay: float = setting(0.0, "share of the localisation rows of stage 1, kept in the mix")


PRESETS = {
    # Half of stage 1's rate: a switch of task at the full rate forgets the boxes.
    "toy": {
        "load": "fp32", "tune": "full", "keep_features": True, "optimizer": "muon", "lr": 7e-4, "muon_lr": 0.009,
        "steps": 580, "scenes": 16, "branches": 4, "micro_scenes": 64, "warmup": 0.05, "eval_every": 150, "save_every": 290,
        "direct": 0.4, "worked": 1.0, "replay": 1.0,
    },
    # The paper: one epoch, 16 rows a step, 1e-5 for full tuning.
    "3b": {
        "lr": 1e-4, "scenes": 4, "branches": 9, "checkpointing": True, "batch": 16,
        "min_pixels": 16 * 28 * 28, "max_pixels": 128 * 28 * 28,
    },
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# 2. The idea: many kinds of questions, one scene
# ------------------------------------------------------------------------------------------------

NEW_TOKENS = 160  # of the longest answer, a worked one


def mix(scenes, settings):
    """Packs of the asked-for shares of direct, worked and replayed rows; the questions of a scene stay together."""
    share = {"locate": settings.replay, "worked": settings.worked}
    rng = random.Random(settings.seed)
    for scene in scenes:
        scene.examples = [e for e in scene.examples if rng.random() < share.get(e.question_type, settings.direct)]
    return common.make_packs(scenes, settings.branches, settings.seed)


# ------------------------------------------------------------------------------------------------
# 3. The loop is common.sft; 4. Main
# ------------------------------------------------------------------------------------------------


@common.ending_together()
def main():
    """Read, adapt, train, write."""
    settings = common.parse_settings(UnderstandSettings, PRESETS, "stage2", before="stage1")
    common.start_processes(settings)
    folder, first_step = common.start_run(settings)
    backbone = common.load_backbone(
        settings.model, settings.load, settings.min_pixels, settings.max_pixels, common.device_name()
    )
    kinds = ["spatial"] + ["worked"] * (settings.worked > 0) + ["locate"] * (settings.replay > 0)
    packs = mix(common.load_scenes(settings.data, kinds, backbone.processor), settings)
    heldout = common.heldout_scenes(settings, ["spatial"], backbone.processor)
    boxes = common.heldout_scenes(settings, ["locate"], backbone.processor) if settings.replay else []
    common.adapt(backbone, settings)

    def evaluate(backbone, step):
        scores = {}
        for mode in ["direct"] + ["work"] * (settings.worked > 0):
            examples, texts = common.generate_answers(
                backbone, heldout, mode, NEW_TOKENS, batch=settings.batch, keep=settings.keep_features
            )
            scores[mode] = float(common.score_answers(texts, examples)[0].mean())
            common.log_samples(folder, step, examples, texts)
        if boxes:
            examples, texts = common.generate_answers(
                backbone, boxes, "locate", NEW_TOKENS, batch=settings.batch, keep=settings.keep_features
            )
            scores["iou"] = float(common.score_answers(texts, examples)[0].mean())
        return scores

    panels = {"loss": ["loss"], "held-out scores": ["direct", "work", "iou"], "gradient norm": ["grad_norm"]}
    common.sft(backbone, packs, settings, folder, first_step, evaluate, panels, NEW_TOKENS)
    common.save_run(backbone, folder)
    common.end_processes()


if __name__ == "__main__":
    main()
