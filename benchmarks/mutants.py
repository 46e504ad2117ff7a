"""Plant faults in the code, one at a time, and see whether the tests named beside them fail.

    python benchmarks/mutants.py [--only NAME] [--jobs N] [--json FILE] [--markdown FILE]
    python benchmarks/mutants.py --json docs/results/mutants.json --markdown docs/mutants.md

Each fault is one that a person could make: a sign, a swap, a forgotten detach, an ignored key. For
each, the tree is copied to a temporary folder, the text is replaced, and the named tests run there.
Before that, every old text must occur exactly once in its file, and all named tests must pass on
an unchanged copy. It exits with 1 where fewer than 95 % of the faults are caught, and with 2 where
nothing could be said: a stale entry, tests that fail without a fault, a fault that is no Python.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LEAST = 0.95  # of all faults that must be caught
TIMEOUT = 240  # seconds for the tests of one fault; a fault that hangs them is caught
BASELINE = 1200  # seconds for all named tests on the unchanged tree
PRELOAD = [  # what tests spend their first seconds on; one that is not here is left out
    "pytest",
    "torch._dynamo",
    "torchvision",
    "accelerate",
    "diffusers.models.unets.unet_2d",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.flux.pipeline_flux",
    "transformers.models.clip.modeling_clip",
    "peft",
    "scipy.linalg",
]
LARGE = 2**17  # bytes; larger files are hard links and not copies


class Mutant(NamedTuple):
    """A fault.

    name: what is wrong, in a few words.
    file: where, from the root.
    old, new: the text that is replaced, which occurs once in the file, and what stands there then.
    tests: pytest's node ids or files, of which one should fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Result(NamedTuple):
    """What became of a fault.

    status: "caught", "survived", or "broken" where no test could run.
    by: the first test that failed, or what went wrong.
    """

    name: str
    file: str
    status: str
    by: str
    seconds: float


class Stopped(Exception):
    """Nothing can be said of the tests; the message says why."""


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """An entry of the list, whose tests are named from tests/test_ on."""
    return Mutant(name, file, old, new, tuple(f"tests/test_{t}" for t in tests))


MUTANTS: tuple[Mutant, ...] = (
    # distill/losses.py
    fault(
        "critic trained backwards",
        "distill/losses.py",
        "F.softplus(fake).mean() + F.softplus(-real).mean()",
        "F.softplus(-fake).mean() + F.softplus(real).mean()",
        "losses.py::test_the_critics_loss_is_low_where_data_have_high_logits_and_fakes_low_ones",
        "critic.py::test_training_raises_the_logits_of_data_above_those_of_fakes",
    ),
    fault(
        "student's GAN loss turned round",
        "distill/losses.py",
        "return F.softplus(-logits).mean()",
        "return F.softplus(logits).mean()",
        "losses.py::test_the_students_loss_is_low_where_its_samples_have_high_logits",
    ),
    fault(
        "LogNormal.std ignored",
        "distill/losses.py",
        "self.std * normal",
        "normal",
        "losses.py::test_log_normal_times_have_noise_levels_of_that_mean_and_deviation",
    ),
    fault(
        "Uniform reaches beyond its high end",
        "distill/losses.py",
        "self.low + (self.high - self.low) * u",
        "self.low + self.high * u",
        "losses.py::test_uniform_times_fill_their_range_evenly",
    ),
    fault(
        "square error summed over dimensions",
        "distill/losses.py",
        "(x - y).square().flatten(1).mean(1)",
        "(x - y).square().flatten(1).sum(1)",
        "losses.py::test_distances_are_of_each_sample_and_averaged_over_its_dimensions",
    ),
    fault(
        "mean error over the batch and not of each sample",
        "distill/losses.py",
        "x.abs().flatten(1).mean(1).view(-1, *(1,) * (x.ndim - 1))",
        "x.abs().mean().expand(len(x)).view(-1, *(1,) * (x.ndim - 1))",
        "turns.py::test_dmd2s_gradient_is_the_gap_over_each_samples_own_error",
    ),
    fault(
        "surrogate's target not detached",
        "distill/losses.py",
        "(x - grad).detach()",
        "(x - grad)",
        "objectives.py::test_the_surrogates_gradient_is_the_direction_over_its_size",
    ),
    fault(
        "Huber norm averaged over dimensions",
        "distill/losses.py",
        "(x - y).square().flatten(1).sum(1) + c**2",
        "(x - y).square().flatten(1).mean(1) + c**2",
        "trajectory.py::test_the_huber_norm_runs_over_the_whole_sample",
    ),
    # distill/objectives
    fault(
        "critic's halves swapped in DMD2",
        "distill/objectives/dmd2.py",
        "critique(*logits.chunk(2))",
        "critique(*logits.chunk(2)[::-1])",
        "turns.py::test_the_rivals_loss_is_the_fakes_and_a_share_of_the_critics",
    ),
    fault(
        "sign of the student's GAN term flipped",
        "distill/objectives/dmd2.py",
        "matching + self.realism * real_enough",
        "matching - self.realism * real_enough",
        "turns.py::test_the_critic_pulls_the_student_to_where_logits_are_high",
    ),
    fault(
        "weight of the critic's loss ignored",
        "distill/objectives/dmd2.py",
        "denoising + self.critique * telling",
        "denoising + telling",
        "turns.py::test_the_rivals_loss_is_the_fakes_and_a_share_of_the_critics",
    ),
    fault(
        "fake_times ignored in DMD2",
        "distill/objectives/dmd2.py",
        "self.fake_times.sample(",
        "self.times.sample(",
        "turns.py::test_the_fake_of_dmd2_learns_at_its_own_times_and_the_critic_at_its_own",
    ),
    fault(
        "critic_times ignored in the critic's turn",
        "distill/objectives/dmd2.py",
        "self.noised(y, self.critic_times)",
        "self.noised(y, self.times)",
        "turns.py::test_the_fake_of_dmd2_learns_at_its_own_times_and_the_critic_at_its_own",
    ),
    fault(
        "sign of the distribution-matching gradient",
        "distill/objectives/dmd2.py",
        "(fake - real) / self.scale",
        "(real - fake) / self.scale",
        "turns.py::test_dmd2s_gradient_is_the_gap_over_each_samples_own_error",
    ),
    fault(
        "student moves one step late",
        "distill/objectives/dmd2.py",
        "step % self.student_every == 0",
        "(step + 1) % self.student_every == 0",
        "engine.py::test_the_student_of_step_k_moves_every_kth_step",
    ),
    fault(
        "fake_times ignored in SiD",
        "distill/objectives/sid.py",
        "self.fake_times.sample(",
        "self.times.sample(",
        "turns.py::test_the_fake_of_sid_learns_at_its_own_times",
    ),
    fault(
        "weight of SiD not detached",
        "distill/objectives/sid.py",
        "mean_abs(x - real).detach()",
        "mean_abs(x - real)",
        "turns.py::test_sids_gradient_is_summed_over_dimensions_and_flows_not_through_its_weight",
    ),
    fault(
        "SiD averaged over dimensions",
        "distill/objectives/sid.py",
        "value.flatten(1).sum(1).mean()",
        "value.flatten(1).mean(1).mean()",
        "turns.py::test_sids_gradient_is_summed_over_dimensions_and_flows_not_through_its_weight",
    ),
    fault(
        "memory of f-distill's ratio swapped",
        "distill/objectives/fdistill.py",
        "torch.lerp(found, self.means, self.memory)",
        "torch.lerp(self.means, found, self.memory)",
        "turns.py::test_a_bins_mean_keeps_its_memory_and_takes_the_rest_from_the_turn",
    ),
    fault(
        "f-distill's warmup one step too long",
        "distill/objectives/fdistill.py",
        "self.step < self.warmup",
        "self.step <= self.warmup",
        "turns.py::test_the_first_steps_are_plain_dmd2_and_not_one_more",
    ),
    fault(
        "f-distill's weights not normalised",
        "distill/objectives/fdistill.py",
        "h / h.mean()",
        "h",
        "turns.py::test_the_first_steps_are_plain_dmd2_and_not_one_more",
    ),
    fault(
        "labels dropped the wrong way round",
        "distill/objectives/diffusion.py",
        "device=labels.device) < self.drop",
        "device=labels.device) > self.drop",
        "turns.py::test_that_share_of_labels_becomes_the_null_class_and_the_others_stay",
    ),
    fault(
        "consistency's target network keeps the wrong share",
        "distill/objectives/consistency.py",
        "1 - self.target_ema)",
        "self.target_ema)",
        "trajectory.py::test_the_target_network_follows_only_after_the_turn",
    ),
    fault(
        "ECT's stages start one too early",
        "distill/objectives/consistency.py",
        "step // self.stage_steps + 1)",
        "step // self.stage_steps)",
        "trajectory.py::test_ects_steps_shrink_as_published",
    ),
    fault(
        "progressive's loss weighed by the least",
        "distill/objectives/progressive.py",
        "(alpha / sigma).square().clamp(min=1)",
        "(alpha / sigma).square().clamp(max=1)",
        "trajectory.py::test_the_loss_is_the_larger_of_the_errors_of_x_and_eps",
    ),
    fault(
        "f-distill trusts every ratio",
        "distill/objectives/fdistill.py",
        ".clamp(self.ratio_min, self.ratio_max)",
        "",
        "turns.py::test_ratios_are_trusted_within_their_limits",
    ),
    fault(
        "iCT's Huber constant without the root of the size",
        "distill/objectives/consistency.py",
        "0.00054 * x[0].numel() ** 0.5",
        "0.00054",
        "trajectory.py::test_hubers_constant_is_what_the_recipe_says",
    ),
    fault(
        "Huber constant of a recipe times the root of the size",
        "distill/objectives/consistency.py",
        "if self.huber_c is None else self.huber_c",
        "if self.huber_c is None else self.huber_c * x[0].numel() ** 0.5",
        "trajectory.py::test_hubers_constant_is_what_the_recipe_says",
    ),
    fault(
        "a stage's average holds the stage before",
        "distill/engine.py",
        "            self.ema.restart()",
        "            pass",
        "engine.py::test_a_stages_average_holds_no_weights_of_the_one_before",
    ),
    fault(
        "the first place of a chain trained twice as often",
        "students/generator.py",
        "places = [(first + i) % n for i in range(size)]",
        "places = [(first + i) % (n + 1) % n for i in range(size)]",
        "students.py::test_a_rollout_spends_as_much_on_each_place_and_no_more_than_it_must",
    ),
    fault(
        "gradients through every step of a rollout",
        "students/generator.py",
        "            with torch.no_grad():\n                moved",
        "            with torch.enable_grad():\n                moved",
        "students.py::test_a_rollout_spends_as_much_on_each_place_and_no_more_than_it_must",
    ),
    fault(
        "shorter chains drawn as often as the longest",
        "students/generator.py",
        "random.choices(self.counts, self.weights)",
        "random.choices(self.counts)",
        "students.py::test_counts_are_drawn_by_their_weights_and_places_alike",
    ),
    fault(
        "rivals see every place though told to see the last",
        "students/generator.py",
        'if sees == "last" else',
        'if sees != "last" else',
        "objectives.py::test_rivals_see_the_end_of_the_chain_unless_told_to_see_every_place",
    ),
    fault(
        "times of plain diffusion ignored",
        "distill/objectives/diffusion.py",
        "self.times.sample(batch.data",
        "Diffusion.times.sample(batch.data",
        "turns.py::test_plain_diffusion_learns_at_its_own_noise_levels",
    ),
    # distill: player, optimizers, ema, engine
    fault(
        "gradient clipping removed",
        "distill/player.py",
        "self.moves.clip or math.inf",
        "math.inf",
        "player.py::test_a_gradient_that_is_too_long_is_shortened_to_the_clip_and_keeps_its_direction",
    ),
    fault(
        "cosine decay made linear",
        "distill/player.py",
        "(1 + math.cos(math.pi * done)) / 2",
        "1 - done",
        "player.py::test_a_cosine_is_no_line",
    ),
    fault(
        "decay_steps ignored",
        "distill/player.py",
        "age / (self.decay_steps or steps)",
        "age / steps",
        "player.py::test_a_cosine_is_no_line",
    ),
    fault(
        "warmup one step short",
        "distill/player.py",
        "(age + 1) / (self.warmup + 1)",
        "(age + 1) / max(1, self.warmup)",
        "player.py::test_the_rate_of_a_turn_follows_the_schedule_from_its_start",
    ),
    fault(
        "eps and weight decay swapped",
        "distill/player.py",
        "moves.betas, moves.eps, moves.weight_decay",
        "moves.betas, moves.weight_decay, moves.eps",
        "player.py::test_every_key_of_a_players_moves_reaches_its_optimiser",
    ),
    fault(
        "gradients summed over processes",
        "distill/player.py",
        'reduction="mean"',
        'reduction="sum"',
        "player.py::test_gradients_of_two_processes_are_averaged_bucket_by_bucket",
    ),
    fault(
        "betas swapped in offloaded AdamW",
        "distill/optimizers.py",
        'beta1=group["betas"][0]',
        'beta1=group["betas"][1]',
        "optimizers.py::test_offloaded_moments_give_adamws_numbers_bit_for_bit",
    ),
    fault(
        "weight decay of offloaded AdamW lost",
        "distill/optimizers.py",
        'weight_decay=group["decay"]',
        "weight_decay=0.0",
        "optimizers.py::test_offloaded_moments_give_adamws_numbers_bit_for_bit",
    ),
    fault(
        "EMA keeps the wrong share",
        "distill/ema.py",
        "(self.mean, now, 1 - decay)",
        "(self.mean, now, decay)",
        "engine.py::test_the_average_has_a_short_memory_at_first",
        "updates.py::test_each_step_moves_the_average_once_and_after_the_student",
    ),
    fault(
        "EMA off by one update",
        "distill/ema.py",
        "(self.updates + 1) / (self.updates + 10)",
        "(self.updates + 2) / (self.updates + 11)",
        "updates.py::test_each_step_moves_the_average_once_and_after_the_student",
    ),
    fault(
        "average never updated",
        "distill/engine.py",
        "        self.ema.update()\n",
        "",
        "updates.py::test_each_step_moves_the_average_once_and_after_the_student",
    ),
    fault(
        "scale of accumulation lost",
        "distill/engine.py",
        "self.accelerator.backward(loss.value / shards)",
        "self.accelerator.backward(loss.value)",
        "updates.py::test_the_gradient_of_an_update_is_the_mean_over_its_shards",
    ),
    fault(
        "shards of a batch share their noise",
        "distill/engine.py",
        "seed_all(self.cfg.seed, self.step, place, shard)",
        "seed_all(self.cfg.seed, self.step, place)",
        "updates.py::test_every_shard_of_every_turn_and_step_draws_noise_of_its_own_and_always_the_same",
    ),
    fault(
        "the worst checkpoint kept as the best",
        "distill/engine.py",
        "metrics[headline] < self.best",
        "not metrics[headline] < self.best",
        "updates.py::test_the_checkpoint_that_is_kept_as_the_best_has_the_lowest_headline",
    ),
    # distill: data, encode, images, schedules, budget
    fault(
        "every epoch in one order",
        "distill/data.py",
        'seed_of(self.seed, "order", epoch)',
        'seed_of(self.seed, "order", 0)',
        "batches.py::test_every_epoch_has_an_order_of_its_own_and_every_run_its_own_orders_and_noise",
    ),
    fault(
        "noise of a batch not of the run's seed",
        "distill/data.py",
        'seed_of(self.seed, "noise", draw, shard)',
        'seed_of("noise", draw, shard)',
        "batches.py::test_every_epoch_has_an_order_of_its_own_and_every_run_its_own_orders_and_noise",
    ),
    fault(
        "shards overlap",
        "distill/data.py",
        "(draw * shards + shard) * size",
        "(draw + shard) * size",
        "data.py::test_two_shards_hold_what_one_twice_as_large_does",
    ),
    fault(
        "rounds of buckets repeat",
        "distill/data.py",
        "number * source.size + turn, shard",
        "turn, shard",
        "data.py::test_no_two_batches_of_buckets_share_their_noise",
    ),
    fault(
        "rows of bad items left empty",
        "distill/encode.py",
        "                rows += n\n",
        "                rows += len(some)\n",
        "data.py::test_what_is_bad_is_counted_named_and_skipped",
    ),
    fault(
        "buckets share one seed",
        "distill/encode.py",
        'seed_of(seed, "bucket", bucket) if bucket else seed',
        "seed",
        "data.py::test_every_bucket_has_a_seed_of_its_own_and_the_first_has_the_runs",
    ),
    fault(
        "all prompts counted as cut",
        "teachers/cuts.py",
        "places.update(i for i, ids in enumerate(rows) if len(ids) > limit)",
        "places.update(range(len(rows)))",
        "pictures.py::test_prompts_that_are_cut_are_counted_in_one_line_with_the_first_of_them",
    ),
    fault(
        "pictures in 0 … 1",
        "distill/images.py",
        "torch.stack(images).float() / 127.5 - 1",
        "torch.stack(images).float() / 255",
        "batches.py::test_class_folders_are_labels_by_their_numbers_or_else_by_the_order_of_their_names",
    ),
    fault(
        "energy distance without its cross term's factor",
        "distill/schedules.py",
        "2 * mean(torch.cdist(a, b))",
        "mean(torch.cdist(a, b))",
        "schedules.py::test_the_energy_distance_by_hand",
    ),
    fault(
        "GITS sums costs of the wrong nodes",
        "distill/schedules.py",
        "int(came[k, nodes[-1]])",
        "int(came[k - 1, nodes[-1]])",
        "schedules.py::test_the_cheapest_walk_is_the_one_that_trying_all_finds",
    ),
    fault(
        "a budget buys one step less",
        "distill/budget.py",
        "if total > budget:",
        "if total >= budget:",
        "budget.py::test_a_budget_buys_the_most_steps_that_do_not_exceed_it",
    ),
    fault(
        "pictures stretched and not cut",
        "distill/images.py",
        "max(height / image.height, width / image.width)",
        "min(height / image.height, width / image.width)",
        "data.py::test_a_picture_is_cut_at_its_centre_and_not_stretched",
    ),
    fault(
        "buckets by the gap of ratios and not of their logarithms",
        "distill/images.py",
        "abs(log - math.log(aspect)) for log in logs",
        "abs(math.exp(log) - aspect) for log in logs",
        "data.py::test_images_between_two_buckets_go_to_the_nearer_by_ratio",
    ),
    fault(
        "the oldest checkpoints kept",
        "distill/checkpoint.py",
        "steps(root)[:-keep]",
        "steps(root)[keep:]",
        "engine.py::test_only_the_newest_checkpoints_are_kept",
    ),
    fault(
        "leaderboard by the most steps",
        "distill/leaderboard.py",
        "if v.metrics), key=lambda v: v.steps or 0)",
        "if v.metrics), key=lambda v: -(v.steps or 0))",
        "bench.py::test_students_are_ordered_by_their_distance_in_the_fewest_steps",
    ),
    # students
    fault(
        "critic's heads summed",
        "students/critic.py",
        "torch.stack(logits).mean(0)",
        "torch.stack(logits).sum(0)",
        "critic.py::test_a_logit_is_the_mean_over_the_heads",
    ),
    fault(
        "attention of a critic's tokens along the wrong axis",
        "students/critic.py",
        "self.attend(x).softmax(1)",
        "self.attend(x).softmax(2)",
        "critic.py::test_a_head_of_tokens_starts_as_their_average_whatever_their_number",
    ),
    fault(
        "critic reads the text's stream",
        "students/critic.py",
        "for o in reversed(out)",
        "for o in out",
        "critic.py::test_of_two_streams_the_pictures_is_read",
    ),
    fault(
        "alpha of adapters ignored",
        "students/lora.py",
        "self.rank if self.alpha is None else self.alpha",
        "self.rank",
        "adapters.py::test_shared_gradients_are_those_of_separate_merged_copies",
    ),
    fault(
        "adapters recomputed under no adapter",
        "students/lora.py",
        "(nullcontext(), using(backbone, name))",
        "(nullcontext(), nullcontext())",
        "adapters.py::test_shared_gradients_are_those_of_separate_merged_copies",
    ),
    fault(
        "use of an adapter not undone",
        "students/lora.py",
        "            m._active_adapter, m._disable_adapters = active, disabled",
        "            m._active_adapter, m._disable_adapters = [], True",
        "adapters.py::test_an_adapter_used_within_anothers_use_gives_it_back",
    ),
    fault(
        "merged weights left in float32",
        "students/lora.py",
        "return twin.base_layer.weight.detach().to(base.dtype)",
        "return twin.base_layer.weight.detach()",
        "adapters.py::test_an_adapter_is_added_to_half_precision_weights_in_float32",
    ),
    fault(
        "adapters kept in the base's precision",
        "students/lora.py",
        "p.data = p.data.float()  # what learns",
        "p.data = p.data  # what learns",
        "adapters.py::test_an_adapter_is_added_to_half_precision_weights_in_float32",
    ),
    fault(
        "renoising ignores the floor",
        "students/generator.py",
        "sigma**2 - (alpha * self.floor) ** 2",
        "sigma**2",
        "students.py::test_renoising_tops_up_what_the_floor_left",
    ),
    fault(
        "gradients through every step",
        "students/generator.py",
        "with torch.no_grad():\n            for k in range(last)",
        "with torch.enable_grad():\n            for k in range(last)",
        "students.py::test_gradients_flow_through_the_last_step_only",
    ),
    fault(
        "DDIM students' indices off by one",
        "students/stock.py",
        "(1 - k / steps)) - 1) for k",
        "(1 - k / steps)) - 2) for k",
        "students.py::test_a_students_times_are_its_schedulers_at_every_count",
    ),
    fault(
        "grid of consistency students off by one",
        "students/stock.py",
        "(n // steps) / (n - 1)",
        "(n // steps) / n",
        "students.py::test_a_students_times_are_its_schedulers_at_every_count",
    ),
    fault(
        "LCM boundary reads the scaled index twice",
        "students/stock.py",
        "scaled**2 + LCM_DATA**2",
        "scaled**2 + LCM_DATA",
        "students.py::test_a_ddpm_students_boundary_is_lcms",
    ),
    fault(
        "one wrong pixel passes the export's check",
        "students/export.py",
        "gap.max().item(), TOLERANCE",
        "gap.mean().item(), TOLERANCE",
        "students.py::test_one_pixel_that_differs_fails_an_export",
    ),
    fault(
        "pictures' noise begins anew in every batch",
        "students/export.py",
        "z, *fresh = [x[i : i + batch].to(device) for x in noise]",
        "z, *fresh = [x[: min(batch, n - i)].to(device) for x in noise]",
        "students.py::test_pictures_do_not_depend_on_the_batch_size",
    ),
    fault(
        "returns' noise of the first noise's seed",
        "students/export.py",
        "torch.Generator().manual_seed(seed + 1)",
        "torch.Generator().manual_seed(seed)",
        "families.py::test_a_stock_pipeline_samples_the_student[renoise-full-flux-schnell]",
    ),
    # teachers
    fault(
        "guidance counted from the conditional",
        "teachers/denoiser.py",
        "negative + scale * (x - negative)",
        "x + scale * (x - negative)",
        "guidance.py::test_a_negative_prompt_is_another_null",
    ),
    fault(
        "network's own loss unweighted",
        "teachers/denoiser.py",
        "(self.weight(t) * error).mean()",
        "error.mean()",
        "denoiser.py::test_the_loss_is_the_squared_error_by_its_weight_averaged_over_dimensions",
    ),
    fault(
        "weight at another process's time",
        "teachers/denoiser.py",
        "self.denoiser.weight(self.own(t))",
        "self.denoiser.weight(t)",
        "denoiser.py::test_a_wrapper_has_the_weight_of_its_network_at_the_same_noise",
    ),
    fault(
        "projected guidance by g and not by g - 1",
        "teachers/guidance.py",
        "x + (scale - 1) * (gap",
        "x + scale * (gap",
        "guidance.py::test_projection_with_eta_one_and_no_threshold_is_classifier_free",
    ),
    fault(
        "interval of guidance shut at the wrong end",
        "teachers/guidance.py",
        "(sigma > self.low * alpha) & (sigma <= self.high * alpha)",
        "(sigma >= self.low * alpha) & (sigma < self.high * alpha)",
        "guidance.py::test_an_interval_holds_its_high_end_and_not_its_low_one",
    ),
    fault(
        "rescaled guidance by the wrong share",
        "teachers/guidance.py",
        "1 + self.factor * (gain - 1)",
        "1 + (1 - self.factor) * (gain - 1)",
        "guidance.py::test_rescaling_by_zero_is_nothing_and_by_one_keeps_the_conditionals_deviation",
    ),
    fault(
        "Heun takes the end's slope alone",
        "teachers/solver.py",
        "(eps + eps_s) / 2",
        "eps_s",
        "solver.py::test_a_heun_step_from_noise_or_onto_data_is_a_ddim_step_and_others_are_not",
    ),
    fault(
        "DPM-Solver++ leans the wrong way",
        "teachers/solver.py",
        "(1 + lead) * x - lead * before",
        "(1 - lead) * x + lead * before",
        "solver.py::test_halving_the_step_divides_the_error_by_two_to_the_order[dpmpp_2m-2-Trig(sigma_data=1.0)]",
    ),
    fault(
        "ancestral steps with too little fresh noise",
        "teachers/solver.py",
        "(1 - keep**2)",
        "(1 - keep)",
        "solver.py::test_an_ancestral_step_has_the_posteriors_mean_and_variance",
    ),
    fault(
        "shift of a flow inverted in its inverse",
        "teachers/process.py",
        "1 / (1 + self.shift / ratio)",
        "1 / (1 + 1 / (self.shift * ratio))",
        "process.py::test_time_inverts_the_noise_to_signal_ratio",
    ),
    fault(
        "table of a DDPM read one index late",
        "teachers/process.py",
        "torch.searchsorted(table, rho) - 1",
        "torch.searchsorted(table, rho)",
        "process.py::test_time_inverts_the_noise_to_signal_ratio",
    ),
    fault(
        "weights of a mixture ignored",
        "teachers/analytic.py",
        "self.weights.log() - gap",
        "-gap",
        "denoiser.py::test_a_mixtures_weights_are_the_shares_of_its_components",
    ),
    fault(
        "EDM networks read log σ in other units",
        "teachers/schedule.py",
        "else (0.0, 0.25)",
        "else (0.0, 1.0)",
        "unet.py::test_the_denoiser_says_what_the_stock_scheduler_says",
    ),
    fault(
        "codes of two weights swapped",
        "teachers/quantised.py",
        "codes[:, 0] << 4 | codes[:, 1]",
        "codes[:, 1] << 4 | codes[:, 0]",
        "quantised.py::test_nf4_gives_each_weight_the_nearest_level_of_its_block",
    ),
    fault(
        "adaptive guidance stops where x̂ differ",
        "teachers/guidance.py",
        "agree >= self.threshold",
        "agree <= self.threshold",
        "guidance.py::test_adaptive_guidance_that_stops_at_once_guides_one_call",
    ),
    # eval
    fault(
        "covariance over N",
        "eval/fid.py",
        "tally.squares / (tally.n - 1)",
        "tally.squares / tally.n",
        "stream.py::test_moments_in_one_go_are_torchs_to_the_bit",
    ),
    fault(
        "Fréchet distance of means not squared",
        "eval/fid.py",
        "(a.mean - b.mean).square().sum()",
        "(a.mean - b.mean).abs().sum()",
        "metrics.py::test_the_frechet_distance_is_torch_fidelitys",
    ),
    fault(
        "neighbours one too near",
        "eval/prdc.py",
        "kthvalue(k + 1, dim=1)",
        "kthvalue(k, dim=1)",
        "metrics.py::test_neighbour_metrics_are_the_prdc_packages",
    ),
    fault(
        "recall by the real balls",
        "eval/prdc.py",
        "(gap < fake_ball).any(1)",
        "(gap < ball[:, None]).any(1)",
        "metrics.py::test_neighbour_metrics_are_the_prdc_packages",
    ),
    fault(
        "density not over k",
        "eval/prdc.py",
        "holding.double().mean().item() / k",
        "holding.double().mean().item()",
        "metrics.py::test_neighbour_metrics_are_the_prdc_packages",
    ),
    fault(
        "width of CMMD's kernel without its 2",
        "eval/mmd.py",
        "(-2 * sigma**2)",
        "(-(sigma**2))",
        "metrics.py::test_the_gaussian_distance_of_shifted_gaussians_is_its_closed_form",
    ),
    fault(
        "unbiased discrepancy over all pairs",
        "eval/mmd.py",
        "(total(kernel, x, x) - diagonal(kernel, x)) / (n * (n - 1))",
        "(total(kernel, x, x) - diagonal(kernel, x)) / (n * n)",
        "metrics.py::test_kernel_distances_are_torch_fidelitys",
    ),
    fault(
        "CMMD's embeddings not of length one",
        "eval/mmd.py",
        "torch.nn.functional.normalize(f.double(), dim=1)",
        "f.double()",
        "metrics.py::test_cmmd_takes_embeddings_at_length_one_and_sums_in_blocks",
    ),
    fault(
        "Vendi score of sums and not of means",
        "eval/vendi.py",
        "gram / len(x)",
        "gram / x.shape[1]",
        "metrics.py::test_the_vendi_score_counts_different_samples",
    ),
    fault(
        "inception score of unshuffled splits",
        "eval/inception_score.py",
        "subset(seen.kept, n, seed=0).tensor_split",
        "seen.kept.tensor_split",
        "metrics.py::test_splits_are_of_shuffled_samples_and_their_spread_is_the_populations",
    ),
    fault(
        "inception score's marginal over classes",
        "eval/inception_score.py",
        "log_p.logsumexp(0) - math.log(len(log_p))",
        "log_p.logsumexp(0)",
        "metrics.py::test_the_inception_score_is_torch_fidelitys",
    ),
    fault(
        "CLIP score's prefix behind the prompt",
        "eval/clip.py",
        "prefix + p for p",
        "p + prefix for p",
        "features.py::test_the_prefix_stands_before_the_prompt",
    ),
    fault(
        "CMMD's pictures stretched",
        "eval/resize.py",
        "pil_bytes(centre(images, min(images.shape[2:]), floor), size)",
        "pil_bytes(images, size)",
        "features.py::test_cmmds_pictures_are_cut_to_the_central_square_and_then_resized_by_pillow",
    ),
    fault(
        "CLIP's pictures cut before they are resized",
        "eval/resize.py",
        "(size, int(size * w / h)) if h <= w else (int(size * h / w), size)",
        "(size, size)",
        "features.py::test_clips_own_preparation_is_its_processors_whatever_the_shape",
    ),
    fault(
        "extrapolation over N and not 1 / N",
        "eval/extrapolate.py",
        "x = 1 / torch.tensor(counts, dtype=torch.double)",
        "x = torch.tensor(counts, dtype=torch.double)",
        "metrics.py::test_a_line_in_one_over_n_is_extrapolated_exactly",
    ),
    fault(
        "tallies joined without the gap of their means",
        "eval/stream.py",
        "squares.addr_(gap, gap, alpha=self.n * other.n / n)",
        "squares",
        "stream.py::test_joined_moments_are_those_of_all_samples",
    ),
    fault(
        "signal-to-noise ratio by amplitude",
        "eval/perceptual.py",
        "10 * torch.log10(255**2 / error)",
        "10 * torch.log10(255 / error)",
        "features.py::test_the_signal_to_noise_ratio_is_torchmetrics_definition",
    ),
    fault(
        "spread of KID over one subset fewer",
        "eval/mmd.py",
        "values.std(unbiased=False)",
        "values.std()",
        "metrics.py::test_the_spread_of_kid_is_the_populations_over_its_subsets",
    ),
    fault(
        "averages of chunks not by their sizes",
        "eval/gather.py",
        "weigh(row, len(samples.images))",
        "weigh(row, 1)",
        "stream.py::test_averages_over_chunks_are_by_their_sizes",
    ),
    fault(
        "speed of the last seed",
        "eval/protocol.py",
        'median(r["images_per_s"] for r in runs)',
        'runs[-1]["images_per_s"] if runs else median([])',
        "eval.py::test_means_are_over_seeds_with_the_populations_spread_and_speed_is_the_median",
    ),
    fault(
        "digits classifier shown pictures in 0 … 1",
        "eval/spec.py",
        "samples.images.float() / 127.5 - 1",
        "samples.images.float() / 255",
        "eval.py::test_the_classifier_reads_real_digits_as_their_labels_and_others_not",
    ),
    fault(
        "bytes truncated and not rounded",
        "eval/samples.py",
        "* 127.5 + 128)",
        "* 127.5 + 127.5)",
        "eval.py::test_bytes_are_rounded_and_not_truncated",
    ),
)


def mutated(mutant: Mutant, root: Path) -> str:
    """The file's text with the fault in it.

    Raises:
        Stopped: the old text does not occur exactly once, or what comes out is no Python.
    """
    path = root / mutant.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (n := text.count(mutant.old)) != 1:
        raise Stopped(
            f"{mutant.name}: stale: its old text occurs {n} times in {mutant.file}; give a text "
            "that occurs once"
        )
    new = text.replace(mutant.old, mutant.new)
    try:
        compile(new, mutant.file, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise Stopped(f"{mutant.name}: {mutant.file} would be no Python ({error.msg})") from None
    return new


def stale(mutants: Iterable[Mutant], root: Path = ROOT) -> list[str]:
    """A line for each fault that can no longer be planted."""
    found = []
    for mutant in mutants:
        try:
            mutated(mutant, root)
        except Stopped as error:
            found.append(str(error))
    return found


def copy(root: Path, into: Path) -> None:
    """The tree as git sees it, uncommitted changes included; large files are linked."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        source, target = root / name, into / name
        if not source.is_file():  # deleted, and not committed
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.stat().st_size > LARGE:
            with suppress(OSError):  # another file system
                os.link(source, target)
                continue
        shutil.copyfile(source, target)


def tested(tree: Path, tests: Sequence[str], timeout: float, *options: str) -> tuple[int, str]:
    """Run tests in a tree, in a process of their own: pytest's exit status, and what it said.

    The status is -1 where the time ran out; all processes that the tests started are then ended.
    The process is forked from one that has read the packages of others, which saves most of the
    time that a few tests take; nothing of this project is read before the fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        process = context.Process(target=_pytest, args=(tree, log, [*options, *tests]))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
            return -1, ""
        return process.exitcode, log.read_text(encoding="utf-8") if log.exists() else ""


def _pytest(tree: Path, log: Path, words: list[str]) -> None:
    """In the forked process: pytest in the tree, whose packages come before all others."""
    os.setsid()
    said = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1), os.dup2(said, 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tree), before]))
    os.environ["OMP_NUM_THREADS"] = "1"
    import pytest

    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *words]))


def failed(said: str) -> str:
    """The first test that failed, by its node id; nothing where none did."""
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    return found[1] if found else ""


def last(said: str) -> str:
    """The last line of what a program said."""
    return (said.strip().splitlines() or ["it said nothing"])[-1]


def check_unchanged(mutants: Sequence[Mutant], root: Path) -> None:
    """Refuse tests that fail without a fault.

    Raises:
        Stopped: one does, or is not there.
    """
    tests = sorted({t for m in mutants for t in m.tests})
    with tempfile.TemporaryDirectory() as scratch:
        copy(root, Path(scratch))
        status, said = tested(Path(scratch), tests, BASELINE)
    if status:
        raise Stopped(f"without a fault, the tests fail: {failed(said) or last(said)}")


def tried(mutant: Mutant, root: Path) -> Result:
    """Plant a fault in a copy of the tree, and run its tests there."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        copy(root, tree)
        target, text = tree / mutant.file, mutated(mutant, root)
        target.unlink()  # it may be a link
        target.write_text(text, encoding="utf-8")
        status, said = tested(tree, mutant.tests, TIMEOUT, "-x")
    by = failed(said)
    if status == 0:
        kind = "survived"
    elif status == 1 and by:
        kind = "caught"
    elif status == -1:
        kind, by = "caught", "a timeout"
    else:
        kind, by = "broken", by or last(said)
    return Result(mutant.name, mutant.file, kind, by, round(time.monotonic() - began, 1))


def table(results: Sequence[Result]) -> str:
    """The page of docs that says what was caught, and by which test."""
    caught = sum(r.status == "caught" for r in results)
    lines = [
        "# Planted faults",
        "",
        "What the tests are worth is what they catch. `benchmarks/mutants.py` plants these faults",
        "one at a time in a copy of the tree and runs the tests that should fail; it writes this",
        "page:",
        "",
        "```bash",
        "python benchmarks/mutants.py --json docs/results/mutants.json --markdown docs/mutants.md",
        "```",
        "",
        f"Caught: {caught} of {len(results)}. A test of the suite checks that every fault can "
        "still be planted.",
        "",
        "| fault | file | outcome | first test that fails |",
        "|---|---|---|---|",
        *(
            f"| {r.name} | `{r.file}` | {r.status} | {f'`{r.by}`' if r.by else ''} |".replace(
                "tests/", ""
            )
            for r in results
        ),
    ]
    return "\n".join(lines) + "\n"


def written(results: Sequence[Result]) -> str:
    """The results as JSON, without what differs from machine to machine."""
    rows = [{k: v for k, v in r._asdict().items() if k != "seconds"} for r in results]
    caught = sum(r.status == "caught" for r in results)
    return json.dumps({"caught": caught, "of": len(rows), "mutants": rows}, indent=1) + "\n"


def with_kept(results: Sequence[Result], mutants: Sequence[Mutant], file: Path) -> list[Result]:
    """The results of all faults: these, and for the others those that a file of results holds.

    Raises:
        Stopped: it does not hold them all.
    """
    found = {r.name: r for r in results}
    rows = json.loads(file.read_text(encoding="utf-8"))["mutants"] if file.is_file() else []
    kept = {r["name"]: Result(**r, seconds=0.0) for r in rows}
    if lost := [m.name for m in mutants if m.name not in found and m.name not in kept]:
        raise Stopped(f"--only: {file} holds no result of {lost[0]!r}; leave out --only once")
    return [found.get(m.name) or kept[m.name] for m in mutants]


def run(mutants: Sequence[Mutant], root: Path, jobs: int) -> list[Result]:
    """Try all faults, telling of each as it is done; the results are in the list's order."""
    say = sys.stdout.write
    with ThreadPoolExecutor(jobs) as pool:
        results = []
        for result in pool.map(lambda m: tried(m, root), mutants):
            say(f"{result.status:9}{result.seconds:6.1f} s  {result.name}  {result.by}\n")
            sys.stdout.flush()
            results.append(result)
    return results


def main(
    words: Sequence[str] | None = None, mutants: Sequence[Mutant] = MUTANTS, root: Path = ROOT
) -> int:
    """The command; its exit status is 0 where enough faults were caught."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="this fault; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at a time")
    parser.add_argument(
        "--json", type=Path, help="where results go as JSON; with --only, the others' stay in it"
    )
    parser.add_argument("--markdown", type=Path, help="where results go as a page")
    args = parser.parse_args(words)
    if args.jobs < 1:
        parser.error(f"--jobs: {args.jobs}; give 1 or more")
    if args.only and args.markdown and not args.json:
        parser.error("--only: a page is of all faults; name the others' results by --json")
    if unknown := set(args.only or ()) - {m.name for m in mutants}:
        parser.error(f"--only: no fault is named {min(unknown)!r}; see the list in this file")
    chosen = [m for m in mutants if not args.only or m.name in args.only]
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        if lines := stale(mutants, root):
            raise Stopped("\n".join(lines))
        if args.only and args.json:  # are the others' there?
            with_kept([Result(m.name, m.file, "", "", 0.0) for m in chosen], mutants, args.json)
        check_unchanged(chosen, root)
    except Stopped as error:
        sys.stderr.write(f"{error}\n")
        return 2
    results = run(chosen, root, args.jobs)
    if args.only and args.json:
        results = with_kept(results, mutants, args.json)
    if args.json:
        args.json.write_text(written(results), encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(table(results), encoding="utf-8")
    caught = sum(r.status == "caught" for r in results)
    sys.stdout.write(f"{caught} of {len(results)} caught\n")
    if broken := [r for r in results if r.status == "broken"]:
        sys.stderr.write(f"{broken[0].name}: no test could run ({broken[0].by})\n")
        return 2
    return 0 if caught >= LEAST * len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
