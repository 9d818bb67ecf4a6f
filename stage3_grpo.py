"""Stage 3, reason: a short cold start on thinking traces, then GRPO (SpatialLadder, arXiv 2510.08531, section 4, stage 3;
GRPO: DeepSeekMath, arXiv 2402.03300, equations 3 and 4).

For each question the policy samples a group of G completions; a completion is rewarded for its format (one <think> block,
one <answer> block) and for the accuracy of its answer; its advantage is its reward against the group's mean; the policy
moves toward what did better than its siblings. Everything is written out below. What we do differently:
1. the KL reference is the policy with its adapter switched off: every stage merges its adapter, so adapter-off IS the
   starting policy and costs no memory;
2. groups whose rewards are all equal teach nothing: their backward pass is skipped, and they are counted;
3. format is paid only with a legal answer (a letter among the options, a number): paid apart, it locked in completions
   that looked right and answered nothing (--legal_format false is the paper);
4. localisation prompts may be mixed in, rewarded by IoU, so that a small model does not forget its boxes;
5. the cold start stops on a MEASURED format rate of sampled completions (--cold_format). It is a cliff: on the toy the
   rate went from .05 to .41 in thirty steps; and from a model that knows the format by heart GRPO has less to find.

    python stage3_grpo.py                     # toy: about four minutes on two cores
    python stage3_grpo.py --preset 3b --data data/SpatialLadder-26k

Writes runs/<preset>/coldstart and runs/<preset>/stage3, each with metrics.jsonl, samples.jsonl, curves.png, checkpoint/,
model/ (and adapter/).
"""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from common import TrainSettings, setting

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------


LOSSES = ("grpo", "dapo", "dr_grpo")


@dataclass
class GRPOSettings(TrainSettings):
    """Stage 3. lr, steps and the like are GRPO's; what begins with cold_ is the cold start's."""

    cold_lr: float = setting(1e-4, "cold start: highest learning rate of AdamW")
    cold_muon_lr: float = setting(0.009, "cold start: highest learning rate of Muon")
    cold_tune: str = setting("lora", "cold start: lora or full", common.TUNES)
    cold_optimizer: str = setting("adamw", "cold start: adamw or muon", common.OPTIMIZERS)
    cold_steps: int = setting(0, "cold start: optimiser steps; 0: one pass over the traces")
    cold_scenes: int = setting(16, "cold start: scenes in an optimiser step")
    cold_mix: float = setting(0.0, "cold start: rows of stage 2 mixed in, for each trace")
    cold_format: float = setting(1.1, "cold start: stop when this share of sampled completions is well formed and legal")
    cold_eval_every: int = setting(100, "cold start: steps between measurements of that share")
    prompts: int = setting(16, "B: questions in a GRPO step, over all processes")
    group: int = setting(8, "G: completions sampled for a question")
    max_new_tokens: int = setting(1024, "longest completion")
    temperature: float = setting(1.0, "of the rollout; 1: sampler and scorer are one distribution")
    epsilon_low: float = setting(0.2, "the ratio is clipped at 1 - epsilon_low ...")
    epsilon_high: float = setting(0.2, "... and at 1 + epsilon_high")
    beta: float = setting(0.01, "weight of the KL to the starting policy; 0: none")
    loss_type: str = setting(
        "grpo", "mean over: grpo, each sequence, then sequences; dapo, all tokens; dr_grpo, a constant", LOSSES
    )
    mu: int = setting(1, "updates with the same rollout")
    mask_overlong: bool = setting(False, "leave completions that were cut at max_new_tokens out of the loss")
    legal_format: bool = setting(True, "pay the format only with a legal answer; false: the paper")
    locate: float = setting(0.0, "share of localisation prompts, rewarded by IoU")
    show_every: int = setting(20, "steps between decoded samples in samples.jsonl")


PRESETS = {
    "toy": {
        "load": "fp32", "keep_features": True, "micro_scenes": 64, "lr": 2.5e-3, "lora_rank": 32, "lora_alpha": 32,
        "steps": 80, "mu": 2, "prompts": 12, "group": 8, "max_new_tokens": 112, "locate": 0.25, "beta": 0.03, "warmup": 0.05,
        "cold_lr": 3e-4, "cold_muon_lr": 0.003, "cold_tune": "full", "cold_optimizer": "muon", "cold_steps": 200,
        "cold_mix": 2.0, "cold_format": 0.3, "cold_eval_every": 10, "eval_every": 25, "save_every": 50,
    },
    # The paper: G = 4 in its script, beta .01, 1,024 new tokens, temperature 1, one epoch.
    "3b": {
        "prompts": 4, "group": 8, "lr": 1e-5, "checkpointing": True, "batch": 16,
        "min_pixels": 16 * 28 * 28, "max_pixels": 128 * 28 * 28,
    },
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# 2. Data
# ------------------------------------------------------------------------------------------------


def cold_packs(settings, processor):
    """Packs of thinking traces, with cold_mix rows of the stages before for each: what is not rehearsed is forgotten."""
    traces = common.load_scenes(settings.data, ["coldstart"], processor)
    packs = common.make_packs(traces, settings.branches, settings.seed)
    wanted = round(settings.cold_mix * sum(len(pack.pairs) for pack in packs))
    if wanted:
        kinds = ["spatial", "locate"] + ["worked"] * (Path(settings.data) / common.FILES["worked"]).is_file()
        others = common.make_packs(common.load_scenes(settings.data, kinds, processor), settings.branches, settings.seed)
        for pack in common.batch_at(others, 0, len(others), settings.seed):
            if wanted > 0:
                packs.append(pack)
                wanted -= len(pack.pairs)
    return packs


# ------------------------------------------------------------------------------------------------
# 3. The idea: group relative policy optimisation
# ------------------------------------------------------------------------------------------------


def rewards(texts, examples, legal_format=True):
    """Rewards of N completions: (format (N,), accuracy (N,)), each in [0, 1]; the reward is their sum.

    Localisation prompts have no tags: for them the format is a legal JSON list of boxes, the accuracy the mean IoU.
    """
    accuracy, legal = common.score_answers(texts, examples)  # (N,), (N,)
    form = common.score_format(texts)  # (N,)
    located = np.array([example.question_type == "locate" for example in examples])
    form = np.where(located, 1.0, form) * (legal if legal_format else np.where(located, legal, True))
    # Accuracy counts inside an <answer> block only: a bare letter must not be paid.
    tagged = np.array([common.ANSWER.search(text) is not None for text in texts])
    return form, accuracy * (tagged | located)


def group_advantages(reward, loss_type="grpo"):
    """A = (r - mean) / (std + 1e-4) within each group (DeepSeekMath, section 4.1.2). reward (B, G) -> (B, G).

    dr_grpo leaves out the division: it would weigh easy and hard questions more (arXiv 2503.20783).
    """
    centred = reward - reward.mean(1, keepdim=True)  # (B, G)
    return centred if loss_type == "dr_grpo" else centred / (reward.std(1, keepdim=True) + 1e-4)


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, settings, sequences, tokens):
    """The clipped objective, negated, summed over these completions so that all parts of a step add up to it.

    logps, old_logps, ref_logps (N, C): policy now, policy that sampled, reference (None: no KL). advantages (N,).
    mask (N, C): completion tokens that count, end token included. sequences, tokens: N and mask.sum() of the whole step.
    Returns the loss (scalar) and {"kl", "clip"}: sums over tokens, for the log.
    """
    ratio = (logps - old_logps).exp()  # (N, C); with mu = 1 it is 1, and so the loss is about 0: watch the reward
    clipped = ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)  # (N, C)
    advantages = advantages[:, None]  # (N, 1): one advantage for all tokens of a completion
    objective = torch.min(ratio * advantages, clipped * advantages)  # (N, C), for both signs of the advantage
    stats = {"clip": ((ratio * advantages > clipped * advantages) & mask).sum().item(), "kl": 0.0}
    if ref_logps is not None:
        gap = ref_logps - logps  # (N, C)
        kl = gap.exp() - gap - 1  # k3: unbiased, never negative (DeepSeekMath, equation 4)
        objective = objective - settings.beta * kl
        stats["kl"] = (kl * mask).sum().item()
    if settings.loss_type == "grpo":  # mean of each sequence, then of the sequences
        loss = -((objective * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences
    elif settings.loss_type == "dapo":  # mean of all tokens: long completions are not diluted
        loss = -(objective * mask).sum() / tokens
    else:  # dr_grpo, a constant: neither short nor long is favoured
        loss = -(objective * mask).sum() / (sequences * settings.max_new_tokens)
    return loss, stats


# ------------------------------------------------------------------------------------------------
# 4. The loop
# ------------------------------------------------------------------------------------------------


def check(settings):
    """Raise SystemExit for settings with which GRPO cannot work."""
    if settings.group < 2:
        raise SystemExit(f"--group {settings.group} leaves no siblings to compare with: give at least 2.")
    if settings.beta and settings.tune != "lora":
        raise SystemExit("--tune full has no adapter to switch off, so there is no reference: give --beta 0 or --tune lora.")
    if settings.train_vision:
        raise SystemExit("--train_vision: stage 3 keeps the vision tower frozen; its rollouts share the pictures' features.")
    if settings.loss_type not in LOSSES:
        raise SystemExit(f"--loss_type {settings.loss_type}: choose grpo, dapo or dr_grpo.")
    if settings.prompts < (size := common.world()[1]):
        raise SystemExit(f"--prompts {settings.prompts} cannot be shared by {size} processes: give at least {size}.")
    if round(settings.locate * settings.prompts) >= settings.prompts:
        raise SystemExit(f"--locate {settings.locate} leaves no spatial question among --prompts {settings.prompts}: give less.")


def prompt_ids(backbone, example):
    """Token ids of the question and of what opens the answer."""
    words = common.prompt_text(example, "locate" if example.question_type == "locate" else "think") + common.BRANCH_END
    return list(common.encode_text(backbone.tokenizer, words))


def rollout(backbone, prompts, settings):
    """Sample a group for each prompt. prompts: [(Scene, Example)].

    Returns prefixes (B Prefix: system, pictures, question) and completions (B lists of G lists of ids).
    """
    prefixes = []
    for (_, example), prefix in zip(prompts, common.encode_scenes(backbone, [s for s, _ in prompts], settings.keep_features)):
        prefixes.append(common.extend_prefix(prefix, prompt_ids(backbone, example)))
    empty = [[[]] * settings.group for _ in prefixes]  # a rollout's branches start with nothing
    return prefixes, common.branch_generate(backbone, prefixes, empty, settings.max_new_tokens, settings.temperature)


@common.stop_at_signals()
def grpo(backbone, prompts, settings, folder, first_step, evaluate):
    """The loop: rollout, rewards, advantages, update. prompts: [(Scene, Example)] of the training data."""
    rank, size = common.world()
    located = [p for p in prompts if p[1].question_type == "locate"]
    asked = [p for p in prompts if p[1].question_type != "locate"]
    n_located = round(settings.locate * settings.prompts) if located else 0
    check(settings)
    if not asked:
        raise SystemExit(f"{settings.data} has no spatial questions to ask.")
    steps = settings.steps or max(1, len(asked) // (settings.prompts - n_located))
    last = min(steps, settings.max_steps or steps)
    optimizers = common.make_optimizers(backbone.model, settings)
    if first_step:
        common.load_checkpoint(folder, backbone, optimizers)
    prefix = max(common.scene_length(backbone, scene) for scene in {id(scene): scene for scene, _ in prompts}.values())
    prefix += len(prompt_ids(backbone, max((e for _, e in prompts), key=lambda e: len(common.prompt_text(e, "think")))))
    share, longest = math.ceil(settings.prompts / size), settings.max_new_tokens
    part = min(settings.micro_scenes, share)
    common.check_memory(
        backbone, settings, [prefix] * part, [[longest] * settings.group] * part, part * settings.group * longest,
        max(settings.batch, share * settings.group), prefix + longest,
    )  # fmt: skip
    bar = tqdm(range(first_step, last), initial=first_step, total=last, desc=folder.name, disable=rank > 0)
    scores, skipped = {}, 0
    for step in bar:
        began = time.time()
        common.seed_step(settings, step)
        batch = common.batch_at(asked, step, settings.prompts - n_located, settings.seed)
        batch += common.batch_at(located, step, n_located, settings.seed) if n_located else []
        mine = batch[rank::size]  # a group stays in one process

        # Rollout. branch_generate samples in eval mode; the update below runs in train mode.
        prefixes, groups = rollout(backbone, mine, settings)
        flat = [ids for group in groups for ids in group]  # N = B * G completions
        texts = [common.decode(backbone, ids) for ids in flat]
        examples = [example for _, example in mine for _ in range(settings.group)]
        rollout_seconds = time.time() - began

        # Rewards and advantages.
        form, accuracy = rewards(texts, examples, settings.legal_format)  # (N,), (N,)
        reward = torch.tensor(form + accuracy, dtype=torch.float32).view(-1, settings.group)  # (B, G)
        advantages = group_advantages(reward, settings.loss_type).to(backbone.device)  # (B, G)
        alive = reward.std(1) > 0  # (B,) groups that teach something
        ended = torch.tensor([ids[-1] in backbone.stop for ids in flat]).view_as(reward)  # (B, G)
        counted = ended if settings.mask_overlong else torch.ones_like(ended)  # (B, G) completions in the loss
        lengths = torch.tensor([len(ids) for ids in flat]).view_as(reward)  # (B, G)
        sequences, tokens = common.total([float(counted.sum()), float((lengths * counted).sum())])

        # Update, mu times with the same rollout.
        live = [i for i in range(len(mine)) if alive[i] and counted[i].any()]
        parts = [live[i : i + settings.micro_scenes] for i in range(0, len(live), settings.micro_scenes)]
        old, reference, sums, norm = {}, {}, {"kl": 0.0, "clip": 0.0, "entropy": 0.0, "seen": 0.0}, 0.0
        for update in range(settings.mu):
            backbone.model.train()
            for number, part in enumerate(parts):
                # Old and reference log-probabilities come from this same scoring pass, never from generate().
                branches = [[([], ids) for ids in groups[i]] for i in part]
                if update == 0 and settings.beta:
                    with torch.no_grad(), backbone.model.disable_adapter():
                        reference[number] = common.branch_logprobs(backbone, [prefixes[i] for i in part], branches)[0]
                logps, entropy, mask = common.branch_logprobs(backbone, [prefixes[i] for i in part], branches)  # (N, C)
                old.setdefault(number, logps.detach())
                mask = mask & counted[part].flatten()[:, None].to(mask.device)
                loss, stats = grpo_loss(
                    logps, old[number], reference.get(number), advantages[part].flatten(), mask, settings, sequences, tokens
                )
                loss.backward()
                sums["kl"] += stats["kl"]
                sums["clip"] += stats["clip"]
                sums["entropy"] += (entropy * mask).sum().item()
                sums["seen"] += mask.sum().item()
            norm = common.optimizer_step(backbone.model, optimizers, settings, step, steps)
            skipped = common.check_norm(norm, skipped, step + 1, [example.id for _, example in mine])

        # Log, over all processes.
        kl, clip, entropy, seen = common.total(list(sums.values()))
        n, dead, *means = common.total([
            float(len(flat)), float((~alive).sum()), float(reward.sum()), float(form.sum()), float(accuracy.sum()),
            float(reward.std(1).sum()), float(lengths.sum()), float((~ended).sum()),
        ])  # fmt: skip
        names = ("reward", "format", "accuracy", "reward_std", "length", "cut")
        row = {"step": step + 1} | {name: value / n for name, value in zip(names, means)}
        row |= {
            "reward_std": row["reward_std"] * settings.group, "dead_groups": dead * settings.group / n,
            "kl": kl / max(seen, 1), "clip": clip / max(seen, 1), "entropy": entropy / max(seen, 1), "grad_norm": norm,
            "rollout_seconds": rollout_seconds, "update_seconds": time.time() - began - rollout_seconds,
        }  # fmt: skip
        if row["cut"] > 0.5:
            common.say(f"step {step + 1}: {row['cut']:.0%} of the completions were cut: raise --max_new_tokens")
        if (step + 1) % settings.eval_every == 0 or step + 1 == last:
            row |= (scores := evaluate(backbone))
        common.log(folder, row)
        if step % settings.show_every == 0:
            for i in range(min(4, len(flat))):
                common.log(folder, {"step": step + 1, "question": examples[i].question, "options": examples[i].options,
                                    "answer": examples[i].answer, "text": texts[i], "format": form[i], "accuracy": accuracy[i],
                                    "advantage": advantages.flatten()[i].item()}, "samples.jsonl")  # fmt: skip
        shown = {"reward": row["reward"], "dead": row["dead_groups"], "kl": row["kl"]} | scores
        bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()})
        stopping = common.stop_asked()
        if (step + 1) % settings.save_every == 0 or step + 1 == last or stopping:
            common.save_checkpoint(folder, step + 1, backbone, optimizers, settings)
            common.draw_curves(folder, {
                "reward": ["reward", "format", "accuracy"], "groups": ["reward_std", "dead_groups", "cut"],
                "held-out scores": ["think", "iou"], "policy": ["kl", "entropy"],
            })  # fmt: skip
        if stopping and step + 1 < last:
            common.stop_here(folder, step + 1)
    bar.close()


# ------------------------------------------------------------------------------------------------
# 5. Main
# ------------------------------------------------------------------------------------------------


def cold_start(settings):
    """SFT on thinking traces from stage 2's model, unless it is already there. Returns the folder of its model."""
    cold = replace(
        settings, out=str(Path(settings.out).parent / "coldstart"), lr=settings.cold_lr, muon_lr=settings.cold_muon_lr,
        tune=settings.cold_tune, optimizer=settings.cold_optimizer, steps=settings.cold_steps, scenes=settings.cold_scenes,
        eval_every=settings.cold_eval_every, resume="never" if settings.resume == "never" else "auto",
    )  # fmt: skip
    if cold.resume != "never" and (Path(cold.out) / "model" / "config.json").is_file():
        if (made := Path(cold.out) / "config.json").is_file():
            names = ["preset", "model", "data"] + [name for name in vars(cold) if name.startswith("cold_")]
            common.refuse_others(cold.out, json.loads(made.read_text(encoding="utf-8")), vars(cold), names)
        common.say(f"found the cold start in {cold.out}; --resume never makes it anew")
        return f"{cold.out}/model"
    folder, first_step = common.start_run(cold)
    backbone = common.load_backbone(cold.model, cold.load, cold.min_pixels, cold.max_pixels, common.device_name())
    packs = cold_packs(cold, backbone.processor)
    # Measured on training scenes: the held-out ones must not decide when to stop.
    probe = common.batch_at(common.load_scenes(cold.data, ["spatial"], backbone.processor), 0, 64, 1)
    common.adapt(backbone, cold)

    def evaluate(backbone, step):
        common.seed_step(cold, step)
        examples, texts = common.generate_answers(
            backbone, probe, "think", cold.max_new_tokens, cold.temperature, cold.batch, cold.keep_features
        )
        accuracy, legal = common.score_answers(texts, examples)
        formed = (common.score_format(texts) > 0) & legal
        common.log_samples(folder, step, examples, texts)
        return {"format": float(formed.mean()), "accuracy_given_format": float(accuracy[formed].mean()) if formed.any() else 0.0}

    panels = {"loss": ["loss"], "sampled, training scenes": ["format", "accuracy_given_format"]}
    common.sft(
        backbone, packs, cold, folder, first_step, evaluate, panels, cold.max_new_tokens,
        stop=lambda scores: scores["format"] >= cold.cold_format,
    )  # fmt: skip
    common.save_run(backbone, folder)
    return f"{cold.out}/model"


@common.ending_together()
def main():
    """The cold start, then GRPO from its model."""
    settings = common.parse_settings(GRPOSettings, PRESETS, "stage3", before="stage2")
    common.start_processes(settings)
    check(settings)  # now, not after the cold start
    model = cold_start(settings)
    folder, first_step = common.start_run(settings)
    backbone = common.load_backbone(model, settings.load, settings.min_pixels, settings.max_pixels, common.device_name())
    kinds = ["spatial"] + ["locate"] * (settings.locate > 0)
    prompts = [(scene, e) for scene in common.load_scenes(settings.data, kinds, backbone.processor) for e in scene.examples]
    heldout = common.heldout_scenes(settings, ["spatial"], backbone.processor)
    boxes = common.heldout_scenes(settings, ["locate"], backbone.processor) if settings.locate else []
    common.adapt(backbone, settings)

    def evaluate(backbone):
        scores = {}
        for name, scenes in (("think", heldout), ("iou", boxes)):
            if scenes:
                examples, texts = common.generate_answers(
                    backbone, scenes, "think", settings.max_new_tokens, batch=settings.batch, keep=settings.keep_features
                )
                scores[name] = float(common.score_answers(texts, examples)[0].mean())
        return scores

    grpo(backbone, prompts, settings, folder, first_step, evaluate)
    common.save_run(backbone, folder)
    common.end_processes()


if __name__ == "__main__":
    main()
