"""Tests of the tests: a bug put into each pure function on purpose must be caught by a test of that function.

To cover a new function, add a row to `BUGS`. The test that it names stands in the file that mirrors the module
(`rlhf_recipes/shaping/kl.py` -> `tests/shaping/test_kl.py`), imports the function from that module itself, and
takes neither fixtures nor parameters.
"""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

MASKS = "rlhf_recipes/masks.py"
STATISTICS = "rlhf_recipes/ppo/functional/statistics.py"
ADVANTAGES = "rlhf_recipes/ppo/functional/advantages.py"
LOSSES = "rlhf_recipes/ppo/functional/losses.py"
PLACEMENT = "rlhf_recipes/shaping/placement.py"
DENSE = "rlhf_recipes/shaping/dense.py"
TRANSFORMS = "rlhf_recipes/shaping/transforms.py"
NORMALIZATION = "rlhf_recipes/shaping/normalization.py"
PENALTIES = "rlhf_recipes/shaping/penalties.py"
KL = "rlhf_recipes/shaping/kl.py"
METRICS = "rlhf_recipes/statistics/metrics.py"
MESSAGES = "rlhf_recipes/messages.py"
MESSAGE_TEST = "test_messages_become_lines_and_other_values_their_text"
TEXTS = "rlhf_recipes/statistics/texts.py"
ALARM = "rlhf_recipes/evaluation/hacking_signs.py"
EVIDENCE = "rlhf_recipes/evaluation/callbacks/evidence.py"
FRONTIER = "rlhf_recipes/statistics/frontier.py"
AGREEMENT = "rlhf_recipes/statistics/agreement.py"
PAIRS = "rlhf_recipes/reward_modeling/losses/pairs.py"
GROUPS = "rlhf_recipes/reward_modeling/losses/groups.py"
TOKENS = "rlhf_recipes/reward_modeling/losses/tokens.py"
VOTES = "rlhf_recipes/tools/ranking/votes.py"
RANKING = "rlhf_recipes/tools/ranking/ranking.py"
SCORE_INTERVALS = "rlhf_recipes/tools/ranking/score_intervals.py"
RATINGS = "rlhf_recipes/tools/ranking/ratings.py"
ACTIVE = "rlhf_recipes/tools/ranking/active.py"
BOOTSTRAP = "rlhf_recipes/reward_modeling/bootstrap.py"
JUDGING = "rlhf_recipes/evaluation/judges/orders.py"
READOUT = "rlhf_recipes/models/readout.py"
CERTIFICATE = "rlhf_recipes/tools/certificate/functional"
RESAMPLING, ACCURACY = f"{CERTIFICATE}/resampling.py", f"{CERTIFICATE}/accuracy.py"
CALIBRATION, LENGTH = f"{CERTIFICATE}/calibration.py", f"{CERTIFICATE}/length.py"
SAMPLES, SENSITIVITY = f"{CERTIFICATE}/samples.py", f"{CERTIFICATE}/sensitivity.py"
BENCHMARK, VERDICT = f"{CERTIFICATE}/benchmark.py", f"{CERTIFICATE}/verdict.py"
REASONS = f"{CERTIFICATE}/reasons.py"
ROLLOUT, JOINED_BY_HAND = "rlhf_recipes/ppo/rollout.py", "test_micro_batches_are_joined_by_hand"
FURTHER_EPOCH = "test_a_further_epoch_has_the_same_rows_in_other_micro_batches"
TEXTS_OF, PLACEMENTS = "test_texts_of_a_batch_by_hand", "test_each_placement_by_its_name"
GRADIENTS = "rlhf_recipes/ppo/functional/gradients.py"
UPDATE_OF_SEVERAL = "test_update_seconds_of_several_gpus_numbers"
BACKWARD = "test_backward_now_gives_the_value_and_the_gradient_and_frees_the_graph"
AVERAGED = "test_probabilities_are_averaged_over_both_orders"
NUMBERS = "rlhf_recipes/statistics/numbers.py"
TEXTS_BY_HAND = "test_texts_side_by_side_by_hand"
ROWS, PACKED, PADDED = "rlhf_recipes/models/rows.py", "test_packed_rows_by_hand", "test_padded_rows_by_hand"
MEAN_WEIGHTS = "rlhf_recipes/reward_modeling/finished.py"
ENSEMBLE = "rlhf_recipes/rewards/ensemble.py"
PLANNING = "rlhf_recipes/tools/planning"
MEMORY, PHASES, SHARDING = (f"{PLANNING}/{name}.py" for name in ("memory", "phases", "sharding"))
SERVING, SPEED, FIT = (f"{PLANNING}/{name}.py" for name in ("serving", "speed", "fit"))


class Bug(NamedTuple):
    """Put `replacement` in the place of `snippet`, which occurs once in `module`, and `test` must fail."""

    module: str
    snippet: str
    replacement: str
    test: str


BUGS = [
    Bug(MEMORY, "sum(vars(self).values())", "max(vars(self).values())", "test_total_is_the_sum_of_the_parts"),
    Bug(MEMORY, "blocks = linear / 64", "blocks = linear / 128", "test_weight_bytes_numbers"),
    Bug(MEMORY, "else 2 if adapter.in_parts else 3", "else 3", "test_kept_per_layer_numbers"),
    Bug(MEMORY, "(network.layers - again) * (", "network.layers * (", "test_kept_activations_numbers"),
    Bug(MEMORY, "(3, 2) if backward else (4, 3)", "(3, 2)", "test_working_memory_numbers"),
    Bug(
        MEMORY,
        "tokens = min(rows, tokens_in_output(",
        "tokens = max(rows, tokens_in_output(",
        "test_logits_memory_numbers",
    ),
    Bug(MEMORY, "6 * 4 * _KL_POSITIONS", "4 * _KL_POSITIONS", "test_small_terms_numbers"),
    Bug(MEMORY, "return layer * (network.layers + 1)", "return layer * network.layers", "test_small_terms_numbers"),
    Bug(MEMORY, "sizes.rollout * (16 * sizes.prompt", "sizes.rollout * (8 * sizes.prompt", "test_small_terms_numbers"),
    Bug(MEMORY, 'sizes.device == "cpu" and sizes.weight_bytes == 2', "False", "test_small_terms_numbers"),
    Bug(
        MEMORY,
        "sizes.autocast if sizes.weight_bytes == 4 else",
        "False if sizes.weight_bytes == 4 else",
        "test_kept_per_layer_numbers",
    ),
    Bug(PHASES, "optimizer=optimizer_on_a_gpu(sizes, layout)", "optimizer=0.0", "test_generate_numbers"),
    Bug(PHASES, "common.optimizer + gradients_on_a_gpu(sizes, layout)", "common.optimizer", "test_train_numbers"),
    Bug(PHASES, "low, high = 1, 2", "low, high = 2, 3", "test_largest_rollout_fits_and_the_next_does_not"),
    Bug(PHASES, "weights=sizes.others)", "weights=common.weights)", "test_load_numbers"),
    Bug(PHASES, "sizes.rollout * sizes.prompt, backward", "sizes.rollout, backward", "test_generate_numbers"),
    Bug(PHASES, "max(sizes.micro_batch, sizes.evaluation_batch)", "sizes.micro_batch", "test_score_numbers"),
    Bug(PHASES, "+ again + working", "+ working", "test_train_numbers"),
    Bug(PHASES, "sizes.critic_network or sizes.network", "sizes.network", "test_critic_takes_what_it_is"),
    Bug(PHASES, "max(PHASES, key=", "min(PHASES, key=", "test_peak_names_the_largest_phase"),
    Bug(
        PHASES,
        "max(fitting, default=None)",
        "min(fitting, default=None)",
        "test_largest_micro_batch_is_one_of_the_candidates",
    ),
    Bug(SHARDING, "and layout.shards_quantized else 0", "else 0", "test_base_bytes_numbers"),
    Bug(SHARDING, "return whole + divided / layout.processes", "return whole + divided", "test_base_on_a_gpu_numbers"),
    Bug(SHARDING, "if sizes.quantized_bits or layout", "if layout", "test_base_on_a_gpu_numbers"),
    Bug(SHARDING, "numbers * sizes.compute_bytes", "numbers * 4", "test_adapters_numbers"),
    Bug(SHARDING, "(4 if layout.is_zero else 0)", "0", "test_optimizer_and_gradients_numbers"),
    Bug(SHARDING, "(6 if in_16_bits else 4)", "4", "test_optimizer_and_gradients_numbers"),
    Bug(SHARDING, "- network.ends * sizes.weight_bytes", "", "test_buffers_numbers"),
    Bug(SHARDING, "min(divided, MAX_LIVE * sizes.compute_bytes)", "divided", "test_buffers_numbers"),
    Bug(SERVING, "layout.vllm_bytes - weights - working", "layout.vllm_bytes - weights", "test_server_numbers"),
    Bug(SERVING, "max(1.0, network.kv_heads", "(network.kv_heads", "test_cache_of_a_token_numbers"),
    Bug(SERVING, "4 * sizes.policy.parameters", "4 * sizes.trained", "test_only_the_policys_adapter_travels"),
    Bug(
        SPEED, "outputs * 2 * network.embedding\n\n\ndef training", "0\n\n\ndef training", "test_forward_flops_numbers"
    ),
    Bug(SPEED, "+ 2 * attention + again", "+ attention + again", "test_training_flops_numbers"),
    Bug(SPEED, "== 4 and rows > 1", "== 4", "test_decoding_bytes_numbers"),
    Bug(SPEED, "min(inside, pace.network)", "inside", "test_link_bandwidth_numbers"),
    Bug(SPEED, "0.0 if layout.is_zero else adapters_on", "adapters_on", "test_gather_seconds_numbers"),
    Bug(SPEED, "max(reading, computing)", "reading", "test_generation_seconds_numbers"),
    Bug(SPEED, "micro_batches) + reduced", "micro_batches)", UPDATE_OF_SEVERAL),
    Bug(
        SPEED, "layout.processes * sizes.rollout * sizes.completion", "sizes.rollout", "test_tokens_per_second_numbers"
    ),
    Bug(
        FIT,
        '_with(found, "`bnb_4bit_quant_storage: bfloat16`")',
        "found",
        "test_divided_4_bit_weights_must_lie_in_floats",
    ),
    Bug(FIT, "sequences > 0", "sequences >= 0", "test_room_for_vllm"),
    Bug(MASKS, "masked_fill(~mask.bool(), 0.0)", "mul(mask)", "test_counted_stops_values_and_gradients"),
    Bug(
        MASKS,
        "has shape {tuple(tensor.shape)}",
        "has shape {tuple(mask.shape)}",
        "test_check_shapes_names_what_is_wrong",
    ),
    Bug(
        STATISTICS,
        "counted(values, mask).sum() / mask.bool().sum().clamp(min=1)",
        "values.mean()",
        "test_masked_mean_weighs_every_token_alike",
    ),
    Bug(
        STATISTICS,
        "(counts > 0).sum().clamp(min=1)",
        "len(counts)",
        "TestAggregate.test_sequences_without_tokens",
    ),
    Bug(STATISTICS, "length * max(len(sums), 1)", "length", "TestAggregate.test_numbers"),
    Bug(STATISTICS, "kept.square().sum()", "kept.sum().square()", "test_masked_moments_are_sums"),
    Bug(STATISTICS, "if not center:", "if center:", "TestWhiten.test_numbers"),
    Bug(STATISTICS, "torch.rsqrt(variance + 1e-8)", "1.0 / (variance + 1e-8)", "TestWhiten.test_numbers"),
    Bug(
        STATISTICS,
        "moments[2] / (moments[2] - 1)",
        "moments[2] / (moments[2] + 1)",
        "TestWhiten.test_unbiased_numbers",
    ),
    Bug(STATISTICS, "(returns - values).detach()", "(returns + values).detach()", "TestExplainedVariance.test_scale"),
    Bug(ADVANTAGES, "gamma * next_value - values[:, t]", "next_value - values[:, t]", "TestGae.test_discount_numbers"),
    Bug(ADVANTAGES, "delta + gamma * lam * advantage", "delta + gamma * advantage", "TestGae.test_numbers"),
    Bug(ADVANTAGES, "1 - 1 / (alpha * lengths)", "1 - alpha / lengths", "TestLengthAdaptiveLambda.test_numbers"),
    Bug(ADVANTAGES, "mask, gamma, lam=1.0)[1]", "mask, gamma, lam=0.0)[1]", "TestDiscountedReturns.test_numbers"),
    Bug(ADVANTAGES, "first_token_mask(mask)).sum(dim=1)", "mask).sum(dim=1)", "TestBanditAdvantages.test_numbers"),
    Bug(ADVANTAGES, "counts.cumsum(dim=1) == 1", "counts.cumsum(dim=1) > 0", "TestFirstTokenMask.test_numbers"),
    Bug(LOSSES, "(logps - old_logps.detach(), mask)", "(logps, mask)", "TestImportanceRatio.test_numbers"),
    Bug(
        LOSSES,
        "mask.bool().sum(dim=1, keepdim=True).clamp(min=1)",
        "mask.size(1)",
        "TestImportanceRatio.test_numbers",
    ),
    Bug(LOSSES, "ratio.where(within == ratio, 0.0)", "within", "TestImportanceWeights.test_numbers"),
    Bug(
        LOSSES, "torch.maximum(plain, clipped)", "torch.minimum(plain, clipped)", "TestClippedPolicyLoss.test_numbers"
    ),
    Bug(LOSSES, "-dual_clip * advantages", "dual_clip * advantages", "TestClippedPolicyLoss.test_dual_clip_numbers"),
    Bug(LOSSES, "torch.maximum(error, clipped_error)", "clipped_error", "TestClippedValueLoss.test_numbers"),
    Bug(LOSSES, "return -(logps.exp() * logps", "return (logps.exp() * logps", "TestEntropy.test_numbers"),
    Bug(LOSSES, "return policy_loss + vf_coef", "return policy_loss - vf_coef", "TestTotalLoss.test_numbers"),
    Bug(PLACEMENT, "counted_from_here == 1", "counted_from_here == 2", "test_terminal_pays_the_last_counted_token"),
    Bug(
        PLACEMENT,
        "counts.sum(-1, keepdim=True).clamp(min=1)",
        "mask.size(1)",
        "test_uniform_pays_counted_tokens_alike",
    ),
    Bug(KL, "log_ratio = ref_logps - logps", "log_ratio = logps - ref_logps", "test_numbers"),
    Bug(KL, "return -log_ratio", "return (-log_ratio).clamp(min=0)", "test_numbers"),
    Bug(METRICS, "rows < 0.5", "rows <= 0.5", "TestSignTest.test_numbers"),
    Bug(
        METRICS,
        "np.tanh(lengths / (lengths.std() or 1.0))",
        "np.tanh(lengths)",
        "TestLengthControlledWinRate.test_against_scikit_learn",
    ),
    Bug(
        METRICS,
        "_at_equal_length(wins, feature, np.ones((1, len(wins))))",
        "_at_equal_length(wins, -feature + 1.0, np.ones((1, len(wins))))",
        "TestLengthControlledWinRate.test_against_scikit_learn",
    ),
    Bug(
        METRICS,
        "_at_equal_length(wins, feature, draws[:, index].astype(np.float64))",
        "_at_equal_length(wins, feature, np.ones((len(draws), len(wins))))",
        "TestLengthControlledInterval.test_equals_a_bootstrap_of_rows_with_scikit_learn",
    ),
    Bug(METRICS, "(lengths - lengths.mean()) * scores", "lengths * scores", "TestLengthControlledReward.test_numbers"),
    Bug(METRICS, "totals.sum() / max(counts.sum(), 1.0)", "totals.mean()", "test_token_mean_weighs_every_token_alike"),
    Bug(
        ALARM,
        "is_number(entry.get(key))",
        "isinstance(entry.get(key), float)",
        "test_read_series_passes_over_what_is_no_number",
    ),
    Bug(ALARM, "/ math.sqrt(6)", "/ 6", "TestNoise.test_numbers"),
    Bug(
        ALARM,
        "proxy_means[-1] <= proxy_start or",
        "",
        "TestOverOptimization.test_no_sign_where_the_proxy_has_not_risen",
    ),
    Bug(
        ALARM,
        "drop > limits.max_drop * gain and",
        "",
        "TestOverOptimization.test_a_drop_of_a_quarter_of_the_gain_is_allowed",
    ),
    Bug(ALARM, "now <= limits.kl_budget", "now < limits.kl_budget - 1", "test_kl_over_budget"),
    Bug(ALARM, "limits.min_entropy * found[0]", "found[0]", "test_entropy_collapse"),
    Bug(ALARM, "1 / limits.max_length_factor <=", "0 <=", "test_length_drift"),
    Bug(ALARM, "policy.values[-1] - reference.values[-1]", "policy.values[-1]", "test_ngram_takeover"),
    Bug(FRONTIER, "np.exp(min(alpha / beta, 700.0) - 1)", "np.exp(alpha / beta)", "test_numbers_of_both_laws"),
    Bug(FRONTIER, "max(entry[kl], 0.0)) ** 0.5", "abs(entry[kl]))", "test_frontier_reads_what_has_a_kl_and_a_score"),
    Bug(AGREEMENT, "(totals.sum() - 1) *", "totals.sum() *", "test_alpha_of_a_published_example"),
    Bug(AGREEMENT, "decided & (outcomes != 0.5)", "decided", "test_numbers"),
    Bug(
        AGREEMENT,
        "((ours - theirs) ** 2).mean()",
        "(ours - theirs).mean()",
        "TestGradeAgreement.test_ten_is_above_nine",
    ),
    Bug(METRICS, "policy > reference)", "policy >= 0)", "TestWinRate.test_numbers"),
    Bug(METRICS, "reference_scores).mean())", "reference_scores).sum())", "TestWinRate.test_numbers"),
    Bug(METRICS, "np.bincount(index, weights=rows)", "np.bincount(index)", "TestBootstrapInterval.test_numbers"),
    Bug(METRICS, "/ (draws @ counts)", "/ rows", "TestRatioInterval.test_numbers"),
    Bug(METRICS, "+ (z / (2 * n)) ** 2", "", "TestProportionInterval.test_numbers"),
    Bug(METRICS, "float(rows[0]) * count, count,", "float(rows.sum()), len(rows),", "TestShareInterval.test_numbers"),
    Bug(NUMBERS, "list | tuple", "list", "test_json_has_none_for_numbers_that_are_not_finite"),
    Bug(NUMBERS, "value = value[step]", "value = value[path[0]]", "test_a_place_that_is_not_there_holds_nothing"),
    Bug(PLACEMENT, "(gamma, counted_after", "(gamma, -counted_after", "test_discounted_pays_later_tokens_more"),
    Bug(PLACEMENT, "(mask.bool(), scores", "(mask.bool(), 0.5 * scores", "test_every_token_pays_the_score_each_time"),
    Bug(DENSE, "scores - before, 0.0", "before - scores, 0.0", "TestPlaceDifferences.test_numbers"),
    Bug(DENSE, "last_counted[:, :-1]", "last_counted[:, 1:]", "TestPlaceDifferences.test_numbers"),
    Bug(DENSE, "torch.where(counts, positions, -1)", "positions", "TestPlaceDifferences.test_numbers"),
    Bug(DENSE, "prompt_scores.detach().to(scores)", "prompt_scores * 0", "TestPlaceDifferences.test_prompt_numbers"),
    Bug(DENSE, "(1 - weight) * terminal", "terminal", "TestPlaceAttention.test_numbers"),
    Bug(DENSE, "attended / total", "attended", "TestPlaceAttention.test_numbers"),
    Bug(DENSE, "gamma * following - potentials", "following - potentials", "TestPotentialShaping.test_numbers"),
    Bug(DENSE, "last_character = max(start, end - 1)", "last_character = start", "TestAlignRewards.test_numbers"),
    Bug(TRANSFORMS, "= changed - scores", "= scores - changed", "TestApplyTransforms.test_numbers"),
    Bug(TRANSFORMS, "return {name: ", "return {transform.name: ", "TestState.test_state_is_kept_by_name"),
    Bug(TRANSFORMS, "(state[name])", "(state[transform.name])", "TestState.test_state_is_loaded_by_name"),
    Bug(NORMALIZATION, "(self.low, self.high)", "(min=self.low)", "TestClipScores.test_numbers"),
    Bug(NORMALIZATION, "mean if self.center else 0.0", "mean", "TestScaleScores.test_numbers"),
    Bug(NORMALIZATION, "shift**2 * first[0]", "shift * first[0]", "TestScaleScores.test_running_numbers"),
    Bug(NORMALIZATION, "double() - mean).to", "double() + mean).to", "TestSubtractReferenceMean.test_numbers"),
    Bug(PENALTIES, "(scores, -self.penalty)", "(scores, self.penalty)", "TestMissingEos.test_numbers"),
    Bug(
        PENALTIES, "(completions.lengths - self.free_tokens)", "completions.lengths", "TestLengthPenalty.test_numbers"
    ),
    Bug(PENALTIES, "clamp(0, 1)", "clamp(min=0)", "TestOverlongPenalty.test_numbers"),
    Bug(PENALTIES, "1 - len(set(ngrams))", "len(set(ngrams))", "TestRepetitionPenalty.test_numbers"),
    Bug(VOTES, "if other_rank < rank else", "if other_rank > rank else", "TestVotesOfRanking.test_numbers"),
    Bug(VOTES, 'row.get("tie", False)', 'row.get("draw", False)', "TestReadVotes.test_rows"),
    Bug(
        VOTES,
        "voted = dict.fromkeys(item for vote in votes for item in",
        "voted = dict.fromkeys(item for vote in votes[::-1] for item in",
        "TestCheckVotes.test_order_of_items",
    ),
    Bug(VOTES, "sizes[part] < 2", "sizes[part] < 4", "TestIdentifiedItems.test_the_largest_part_that_beat_each_other"),
    Bug(VOTES, "not in beaten]", "in beaten]", "TestCheckUndefeated.test_refuses_undefeated_items"),
    Bug(RANKING, "ELO_PER_NAT / 2))", "ELO_PER_NAT))", "TestWinProbability.test_numbers"),
    Bug(RANKING, "return _sequential(votes,", "return _sequential(votes[::-1],", "TestElo.test_numbers"),
    Bug(RANKING, "total / rounds", "total", "TestAverageElo.test_numbers"),
    Bug(RANKING, "rng.shuffle(order)", "pass", "TestAverageElo.test_numbers"),
    Bug(RANKING, "0.0 if vote.tie else k / 2", "k / 2", "TestRoundRobinElo.test_numbers"),
    Bug(RANKING, " - scores[: len(listed)].mean()", "", "TestBradleyTerry.test_prior_is_what_the_optimizer_finds"),
    Bug(RANKING, "[evalica.Winner.Draw if vote.tie", "[evalica.Winner.X if vote.tie", "TestElo.test_numbers"),
    Bug(SCORE_INTERVALS, "(1 - level) / 2,", "1 - level,", "TestBootstrapScores.test_two_groups_by_hand"),
    Bug(SCORE_INTERVALS, "if vote.group is None", "if True", "TestBootstrapScores.test_two_groups_by_hand"),
    Bug(RATINGS, '"prompt": _text(row["prompt"])', '"prompt": 0', "TestRateRankings.test_pool_prompt"),
    Bug(RATINGS, "if normalize else ratings", "if not normalize else ratings", "TestRateRankings.test_numbers"),
    Bug(ACTIVE, ".sigmoid().var(", ".var(", "TestPreferenceVariance.test_numbers"),
    Bug(ACTIVE, "descending=True", "descending=False", "TestSelectQueries.test_numbers"),
    Bug(ACTIVE, "shuffled[order[:budget]]", "order[:budget]", "TestSelectQueries.test_numbers"),
    Bug(ACTIVE, "halved_after / (done + halved_after)", "1 / (done + 1)", "TestLabelSchedule.test_numbers"),
    Bug(
        BOOTSTRAP,
        "probability /= count",
        "probability /= count + 1",
        "TestBootstrapCount.test_is_poissons_with_mean_1",
    ),
    Bug(BOOTSTRAP, "[] if count else [row]", "[row]", "TestMemberRows.test_rows_of_a_prompt_stay_together"),
    Bug(
        JUDGING,
        "judge, prompt, pair[1], pair[0]",
        "judge, prompt, pair[0], pair[1]",
        "TestJudgeInBothOrders.test_numbers",
    ),
    Bug(
        JUDGING, "=(shown_first - shown_second)", "=(shown_first + shown_second)", "TestJudgeInBothOrders.test_numbers"
    ),
    Bug(JUDGING, "+ 1.0 - _AS_NUMBER", "+ _AS_NUMBER", f"TestJudgeInBothOrders.{AVERAGED}"),
    Bug(JUDGING, "min(max(label, low), high)", "max(label, low)", "test_clamp_by_hand"),
    Bug(JUDGING, " and 0 <= value <= 1", "", "test_what_is_an_answer"),
    Bug(AGREEMENT, 'right["judge"] - right[rule]', 'right["judge"] - 0.5', "test_beside_length_by_hand"),
    Bug(KL, "return (probabilities * (", "return (ref_logps.exp() * (", "TestFullKL.test_numbers"),
    Bug(KL, 'sums if per == "completion" else', "sums if True else", "test_steered_kl_by_hand"),
    Bug(KL, "per_completion > 5 * target and", "", "test_a_target_in_the_other_unit_is_seen"),
    Bug(KL, "if swap else", "if not swap else", "TestChunkedFullKL.test_numbers"),
    Bug(KL, "error * n / self.horizon", "error / self.horizon", "TestAdaptiveKLController.test_numbers"),
    Bug(KL, "self.target - 1, -0.2", "self.target - 1, -2.0", "TestAdaptiveKLController.test_numbers"),
    Bug(READOUT, "return 1.0 / std, -mean / std", "return 1.0 / std, -mean", "TestFitNormalization.test_numbers"),
    Bug(READOUT, "sums / counts.sum(dim=1)", "sums / mask.size(1)", "TestReadScores.test_numbers"),
    Bug(RESAMPLING, "(index, weights=column, ", "(index, ", "TestResampledSums.test_numbers"),
    Bug(RESAMPLING, "len(units) >= FEWEST", "len(units) > 1", "TestMeanSummary.test_too_few_rows_have_no_interval"),
    Bug(RESAMPLING, "(prompts)) >= FEWEST", "(prompts)) > 1", "TestIndependentUnits.test_prompts_or_rows"),
    Bug(RESAMPLING, "< 0.9 * len(values)", "< 0.1 * len(values)", "TestPercentileInterval.test_undefined_statistics"),
    Bug(RESAMPLING, "sums[:, 0] / sums[:, 1]", "sums[:, 0] / len(rows) ** 2", "TestMeanSummary.test_numbers"),
    Bug(
        RESAMPLING,
        "proportion_interval(round(share * count), count",
        "proportion_interval(int(rows.sum()), len(rows)",
        "TestShareSummary.test_copies_of_a_row_say_nothing_new",
    ),
    Bug(
        ACCURACY,
        "share_summary(rows > 0, clusters",
        "share_summary(rows >= 0, clusters",
        "TestPairAccuracy.test_numbers",
    ),
    Bug(ACCURACY, "names == group", "names != group", "TestAccuracyBy.test_numbers"),
    Bug(ACCURACY, "rows[index == bin_].max()", "rows[index <= bin_].min()", "TestValueGroups.test_numbers"),
    Bug(ACCURACY, "np.arange(1, bins) / bins", "np.arange(1, bins) / (bins + 1)", "TestValueBins.test_numbers"),
    Bug(ACCURACY, "np.asarray(differences)[order]", "np.asarray(differences)", "TestAccuracyByValue.test_numbers"),
    Bug(ACCURACY, "high - held_out", "low - held_out", "TestAccuracyGap.test_numbers"),
    Bug(ACCURACY, "dtype=np.float64)) + 1) / 2", "dtype=np.float64)) + 1)", "TestAccuracyAdvantage.test_numbers"),
    Bug(CALIBRATION, "/ sums[:, _BINS]", "/ sums[:, _BINS - 1]", "TestCalibration.test_numbers"),
    Bug(CALIBRATION, "return errors**2", "return abs(errors)", "TestBrierLosses.test_numbers"),
    Bug(CALIBRATION, "(1 - y) * np.logaddexp(0, d)", "(1 - y) * d", "TestLogLosses.test_numbers"),
    Bug(CALIBRATION, "float(right[part].mean())", "float(right.mean())", "TestReliability.test_numbers"),
    Bug(CALIBRATION, 'row["n"] * abs(', "abs(", "TestExpectedCalibrationError.test_numbers"),
    Bug(CALIBRATION, "< confidence)) @", "< 0.5)) @", "TestChanceCalibrationError.test_numbers"),
    Bug(CALIBRATION, "float(scale / brentq", "float(1 / brentq", "TestBestTemperature.test_numbers"),
    Bug(LENGTH, "(ranks, clusters", "(linear, clusters", "TestCorrelation.test_numbers"),
    Bug(LENGTH, "rankdata(values).reshape(values.shape)", "values", "TestCorrelation.test_numbers"),
    Bug(LENGTH, "right[shorter].mean()) / 2", "right[shorter].mean())", "TestLengthControlledAccuracy.test_numbers"),
    Bug(
        LENGTH,
        "sums[:, 2] / sums[:, 3]) / 2",
        "sums[:, 2] / sums[:, 3])",
        "TestLengthControlledAccuracy.test_the_interval_is_that_of_two_independent_shares",
    ),
    Bug(SAMPLES, "_log_choose(rank - 1, ", "_log_choose(rank, ", "TestExpectedBestOfN.test_numbers"),
    Bug(SAMPLES, "np.log(n) - (n - 1) / n", "np.log(n)", "TestBestOfN.test_numbers"),
    Bug(EVIDENCE, "- rankdata(scores[known])", "- scores[known]", "test_ranks_are_compared"),
    Bug(SAMPLES, "second.std()) / std", "second.std())", "TestScoreSpread.test_numbers"),
    Bug(SAMPLES, "second > first.max()", "second >= first.mean()", "TestScoreSpread.test_numbers"),
    Bug(SAMPLES, "float(values.std())", "float(values.std(ddof=1))", "TestDescribe.test_numbers"),
    Bug(SENSITIVITY, "[*completion[:-1], ", "[", "TestTexts.test_a_chat_changes_in_its_last_message_only"),
    Bug(SENSITIVITY, "{text.rstrip()} {text.strip()}", "{text} {text}", "TestTexts.test_repeated"),
    Bug(SENSITIVITY, "(len(ends) - 1) // 2", "len(ends) // 2", "TestTexts.test_truncated"),
    Bug(SENSITIVITY, "{text.rstrip()} {THANKS}", "{THANKS} {text.strip()}", "TestTexts.test_polite"),
    Bug(SENSITIVITY, "[*order[1:], order[0]]", "order", "TestSwappedPrompts.test_numbers"),
    Bug(SENSITIVITY, "np.abs(shifts).mean()", "shifts.mean()", "TestScoreShift.test_numbers"),
    Bug(BENCHMARK, "accuracies[subset] * weight", "accuracies[subset]", "TestSectionScores.test_numbers"),
    Bug(BENCHMARK, "highest[0] / highest.sum()", "highest[0]", "TestBestOfKCredit.test_numbers"),
    Bug(BENCHMARK, "max(good) - min(good)", "max(good) - max(bad)", "TestTiesScore.test_numbers"),
    Bug(REASONS, "map(is_number, (value, *ends))", "map(is_number, ends)", "TestKnownInterval.test_what_is_known"),
    Bug(REASONS, 'if signed else ""', 'if not signed else ""', "TestStated.test_texts"),
    Bug(
        REASONS,
        'Reason("not checked", measure, f"{text}. There',
        'Reason("good", measure, f"{text}. There',
        "test_neither_passes",
    ),
    Bug(
        REASONS,
        'Reason("not checked", measure, f"{text}: beyond',
        'Reason("good", measure, f"{text}: beyond',
        "test_neither_passes",
    ),
    Bug(VERDICT, "_ORDER.index(reason", "-_ORDER.index(reason", "TestJudge.test_numbers"),
    Bug(VERDICT, '"not fit" if blind else ', "", "TestNoEvidence.test_no_rule_passes_without_its_interval"),
    Bug(ROWS, "ends - lengths[order]", "ends", PACKED),
    Bug(ROWS, "rows[tokens] - first", "rows[tokens]", "test_attention_pads_texts_of_like_length_together"),
    Bug(ROWS, "start += count", "start = count", "test_attention_pads_texts_of_like_length_together"),
    Bug(ROWS, "group[:, None] - 1", "group[:, None]", "test_attention_pads_texts_of_like_length_together"),
    Bug(ROWS, "positions[None], ", "self._columns[None], ", PACKED),
    Bug(ROWS, "states[0] if self._packed", "states[0] + 1 if self._packed", PACKED),
    Bug(ROWS, "[:, None] + positions", "[:, None] - positions", PACKED),
    Bug(ROWS, "columns < lengths[:, None]", "columns <= lengths[:, None]", PADDED),
    Bug(ROWS, "* mask.size(1) + ", "* self._length + ", PADDED),
    Bug(ROWS, "packed and not", "True and not", PADDED),
    Bug(ROWS, "self.sources.flatten())", "self.sources.flatten().flip(0))", "test_sequence_groups_by_hand"),
    Bug(ROWS, "index_put((places,), tokens)", "index_put((places.flip(0),), tokens)", PADDED),
    Bug(ROWS, "self.completion_mask], dim=1), packed)", "self.completion_mask], dim=1), not packed)", TEXTS_BY_HAND),
    Bug(ROWS, "[self.prompt_ids, self.completion_ids]", "[self.completion_ids, self.completion_ids]", TEXTS_BY_HAND),
    Bug(ROWS, "keepdim=True) - 1\n", "keepdim=True)\n", "test_positions_before_by_hand"),
    Bug(ROWS, "self.lengths[:, None] - 1)", "self.lengths[:, None])", "test_positions_before_by_hand"),
    Bug(ROWS, "value[:, -prompt:]", "value[:, :prompt]", "test_trimming_by_hand"),
    Bug(ROWS, ".clamp(min=1)", "", "test_columns_are_counted_by_hand"),
    Bug(ROWS, "prompt_mask.sum(dim=1) + ", "prompt_mask.sum(dim=1) - ", TEXTS_BY_HAND),
    Bug(ROWS, "descending=True", "descending=False", "test_parts_by_length_are_the_whole_batch"),
    Bug(ROWS, "torch.ones_like(row) for", "(row > 0).long() for", "test_padding_by_hand"),
    Bug(ROWS, "if left else", "if not left else", "test_parts_that_were_cut_on_the_left_by_hand"),
    Bug(ROLLOUT, "[start : start + per_step]", "[:per_step]", "test_sorting_moves_no_row_to_another_step"),
    Bug(ROLLOUT, "for batch in micro_batches]", "for batch in micro_batches[:1]]", JOINED_BY_HAND),
    Bug(ROLLOUT, "split_tensor_dict(shuffled", "split_tensor_dict(join(micro_batches)", FURTHER_EPOCH),
    Bug(
        ROLLOUT,
        "batch[each.name] for each in fields(Texts)",
        "batch['prompt_ids'] for each in fields(Texts)",
        TEXTS_OF,
    ),
    Bug(ADVANTAGES, "rewards.sum(dim=1), values, mask)", "rewards[:, 0], values, mask)", "test_estimators_by_name"),
    Bug(ADVANTAGES, "mask, gamma, critic_lam)", "mask, gamma, lam)", "test_estimators_by_name"),
    Bug(DENSE, "place_discounted(scores, mask, gamma)", "place_discounted(scores, mask, 1.0)", PLACEMENTS),
    Bug(GRADIENTS, "scale[0] * gradient", "gradient", BACKWARD),
    Bug(GRADIENTS, "loss.detach(), gradients", "0 * loss.detach(), gradients", BACKWARD),
    Bug(NUMBERS, "and not isinstance(value, bool) ", "", "test_true_is_no_number"),
    Bug(MEAN_WEIGHTS, ".mean(dim=0).to(", ".sum(dim=0).to(", "test_mean_weights"),
    Bug(MEAN_WEIGHTS, "member[name].double()", "member[name]", "test_mean_weights"),
    Bug(ENSEMBLE, "std(dim=0, correction=0)", "std(dim=0)", "TestAggregateScores.test_numbers"),
    Bug(ENSEMBLE, "scores.mean(dim=0) - penalty", "scores.mean(dim=0) + penalty", "TestAggregateScores.test_numbers"),
    Bug(PAIRS, "math.log1p(-noise) + ", "", "TestLogPreference.test_numbers"),
    Bug(PAIRS, "math.log(noise) - math.log(2.0)", "math.log(noise)", "TestLogPreference.test_numbers"),
    Bug(
        PAIRS,
        "rejected, label, margin, noise).mean()",
        "rejected, label, margin, noise).sum()",
        "TestPairwiseLoss.test_numbers",
    ),
    Bug(PAIRS, "(strength * _losses", "(_losses", "TestScaledPairwiseLoss.test_numbers"),
    Bug(
        PAIRS,
        "log_preference(-difference - margin, noise)",
        "log_preference(margin - difference, noise)",
        "TestPairwiseLoss.test_margin_numbers",
    ),
    Bug(
        GROUPS,
        "losses, counts = -logps, better",
        "losses, counts = -logps, better | tied",
        "TestRankingLoss.test_numbers",
    ),
    Bug(GROUPS, "logps.transpose(1, 2)) / 2", "logps.transpose(1, 2))", "TestRankingLoss.test_numbers"),
    Bug(
        GROUPS,
        "(ranks[:, :, None] <= ranks[:, None, :])",
        "(ranks[:, :, None] >= ranks[:, None, :])",
        "TestPlackettLuceLoss.test_numbers",
    ),
    Bug(
        GROUPS,
        "logsumexp(dim=1, keepdim=True) - scores.gather(1, best)",
        "amax(dim=1, keepdim=True) - scores.gather(1, best)",
        "TestBestOfKLoss.test_numbers",
    ),
    Bug(
        GROUPS,
        "(scores - ratings).square(), mask",
        "(scores - ratings).square(), mask | True",
        "TestRegressionLoss.test_numbers",
    ),
    Bug(
        GROUPS,
        "(scores[:, :, None] + scores[:, None, :])",
        "(scores[:, :, None] - scores[:, None, :])",
        "TestCenteringLoss.test_numbers",
    ),
    Bug(
        GROUPS,
        "better, _ = _compare(ranks, mask)",
        "better, _ = _compare(ranks, mask | True)",
        "TestUntiedMargins.test_numbers",
    ),
    Bug(GROUPS, "(counts > 0).sum().clamp(min=1)", "len(counts)", "TestGroupMean.test_numbers"),
    Bug(
        TOKENS,
        "losses.masked_fill(~counts, 0.0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)",
        "losses.mean(dim=1)",
        "TestTokenLoss.test_numbers",
    ),
    Bug(
        TEXTS,
        "len(set(ngrams)) / len(ngrams) if ngrams else 0.0\n\n\ndef top",
        "1.0 if ngrams else 0.0\n\n\ndef top",
        "TestDistinct.test_numbers",
    ),
    Bug(MESSAGES, "message.get('role', '?')", "message.get('name', '?')", MESSAGE_TEST),
    Bug(TEXTS, "in dict.fromkeys(_ngrams(sequence, n))", "in _ngrams(sequence, n)", "TestTopNgrams.test_numbers"),
    Bug(TEXTS, "1.0 - len(set(ngrams)) / len(ngrams)", "1.0 - 1.0 / len(ngrams)", "TestRepeatedShare.test_numbers"),
    Bug(TEXTS, "texts[:i] + texts[i + 1 :]", "texts", "TestSelfBleu.test_the_same_and_the_entirely_different"),
]


def source_of(module):
    return (ROOT / module).read_text()


def name_of(module):
    return module.removesuffix(".py").replace("/", ".")


def public_functions(module):
    functions = [node for node in ast.parse(source_of(module)).body if isinstance(node, ast.FunctionDef)]
    return {function.name: function for function in functions if not function.name.startswith("_")}


def place_of(bug):
    """The public function that a bug is in."""
    before, _, _ = source_of(bug.module).partition(bug.snippet)
    line = before.count("\n") + 1
    inside = [name for name, node in public_functions(bug.module).items() if node.lineno <= line <= node.end_lineno]
    return inside[0] if inside else "none"


def mutant_of(bug):
    mutant = ModuleType(name_of(bug.module))
    source = source_of(bug.module).replace(bug.snippet, bug.replacement)
    exec(compile(source, bug.module, "exec"), mutant.__dict__)
    return mutant


def run_test_of(bug):
    """Run the test of a bug from a fresh import of its file, which takes the module under test from `sys.modules`."""
    file = ROOT / "tests" / Path(bug.module).relative_to("rlhf_recipes")
    spec = importlib.util.spec_from_file_location("oracle", file.with_name(f"test_{file.name}"))
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    *group, name = bug.test.split(".")
    getattr(getattr(found, group[0])() if group else found, name)()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{place_of(bug)}-{bug.replacement}")
def test_bug_is_caught(bug, monkeypatch):
    assert source_of(bug.module).count(bug.snippet) == 1, "the snippet must name one place"
    run_test_of(bug)  # passes without the bug, and imports from true modules whatever the test needs
    monkeypatch.setitem(sys.modules, name_of(bug.module), mutant_of(bug))
    with pytest.raises(AssertionError):
        run_test_of(bug)


PURE_FILES = (
    *("masks.py", "functional/*.py", "losses/*.py", "shaping/*.py", "statistics/*.py"),
    *(f"tools/ranking/{name}.py" for name in ("active", "ranking", "ratings", "score_intervals", "votes")),
    *(f"tools/planning/{name}.py" for name in ("memory", "phases", "sharding", "serving", "speed", "fit")),
    *("evaluation/hacking_signs.py", "models/readout.py", "reward_modeling/bootstrap.py", "rewards/ensemble.py"),
    *("ppo/rollout.py", "models/rows.py"),
)
PURE_FUNCTIONS = {  # in files that hold more than pure functions
    (MESSAGES, "as_text"),
    (EVIDENCE, "most_suspicious"),
    *((JUDGING, name) for name in ("clamped", "is_answer", "judge_in_both_orders", "judgement_of", "label_of_both")),
    (MEAN_WEIGHTS, "mean_weights"),
}


def test_every_pure_function_has_a_bug():
    modules = {str(path.relative_to(ROOT)) for name in PURE_FILES for path in ROOT.glob(f"rlhf_recipes/**/{name}")}
    functions = {(module, name) for module in modules for name in public_functions(module)} | PURE_FUNCTIONS
    assert functions - {(bug.module, place_of(bug)) for bug in BUGS} == set()
    assert {bug.module for bug in BUGS} <= modules | {module for module, _ in PURE_FUNCTIONS}
