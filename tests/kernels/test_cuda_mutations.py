"""Small mistakes, one at a time, in csrc/cuda: each must be noticed by a few of the cases that the kernels are tested on.

A mutant that survives means that the tests cannot see such a mistake, or that the code it changed does nothing. `make mutants`
runs them all, `make test` every third.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import cuda_block_cases
import emulator
import pytest
import torch
from attention_cases import Case
from test_cuda_layer_norm import check_equal_numbers, check_layer_norm
from test_cuda_loss import check_extremes, check_loss, check_parts, check_wrong_targets
from test_extreme_values import check_extreme_scores

from kernels import reference

CUDA = emulator.ROOT / "csrc" / "cuda"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """Replaces `old`, which occurs once in `file`, by `new`."""

    what: str
    file: str
    old: str
    new: str
    kernels: str
    """Key of KERNELS: what is built again and checked."""


def _mutations(file: str, kernels: str, *rows: tuple[str, str, str]) -> list[Mutation]:
    return [Mutation(what, file, old, new, kernels) for what, old, new in rows]


MUTATIONS = [
    *_mutations(
        "attention_forward.cuh",
        "attention",
        ("mask lets the next key through", "key >= minimum(work.seqlen_k, query + visible)",
         "key > minimum(work.seqlen_k, query + visible)"),
        ("mask hides the last visible key", "key >= minimum(work.seqlen_k, query + visible)",
         "key + 1 >= minimum(work.seqlen_k, query + visible)"),
        ("no mask on the diagonal", "if (column + Sizes::kKeys > minimum(work.seqlen_k, row + visible))",
         "if (column + Sizes::kKeys > work.seqlen_k)"),
        ("no mask at the end of the keys", "if (column + Sizes::kKeys > minimum(work.seqlen_k, row + visible))",
         "if (column + Sizes::kKeys > row + visible)"),
        ("scale missing", "const float scale = args.scale * kLog2e;", "const float scale = kLog2e;"),
        ("natural exponent for the base-2 one", "const float scale = args.scale * kLog2e;",
         "const float scale = args.scale;"),
        ("last tile of keys skipped", "ceil_div(keys, Sizes::kKeys)", "keys / Sizes::kKeys"),
        ("first tile of keys skipped", "for (int tile = 0; tile < tiles", "for (int tile = 1; tile < tiles"),
        ("last query of the tile forgotten", "minimum(last + visible, work.seqlen_k)",
         "minimum(last + visible - 1, work.seqlen_k)"),
        ("barrier of the loop removed", "    bar_sync();  // this tile has come", "    // this tile has come"),
        ("cp.async wait of the loop removed", "    cp_async_wait<0>();\n    bar_sync();  // this tile",
         "    bar_sync();  // this tile"),
        ("waits for one copy too few", "    cp_async_wait<0>();\n    bar_sync();  // this tile",
         "    cp_async_wait<1>();\n    bar_sync();  // this tile"),
        ("next tile loaded over the one in use", "load_keys(tile + 1);", "load_keys(tile + 2);"),
        ("accumulators not rescaled", "out[m][n][2 * half] *= correction, ", ""),
        ("sum not rescaled", "sum[m][half] * correction", "sum[m][half]"),
        ("maximum of two lanes, not four", "        highest = max_f32(highest, shfl_xor(highest, 2));\n", ""),
        ("sum of two lanes, not four", "      total += shfl_xor(total, 2);\n", ""),
        ("running maximum lost", "float highest = most[m][half];", "float highest = -kInfinity;"),
        ("no guard for rows that see no key", "highest == -kInfinity ? 0.0f : highest;", "highest;"),
        ("scaled before the maximum is taken off", "ex2((p[m][n][i] - shift) * scale)", "ex2(__builtin_fmaf(p[m][n][i], scale, -(shift * scale)))"),
        ("division by zero for rows that see no key", "total == 0.0f ? 0.0f : args.dropout_scale / total",
         "args.dropout_scale / total"),
        ("lse without the maximum", "log_sum_exp(most[m][half] * args.scale, total)", "log_sum_exp(0.0f, total)"),
        ("lse with the maximum in base 2", "log_sum_exp(most[m][half] * args.scale, total)",
         "log_sum_exp(most[m][half] * scale, total)"),
        ("lse written past the end", "t == 0 && query < work.seqlen_q", "t == 0"),
        ("dropout's scale missing", "args.dropout_scale / total", "1.0f / total"),
        ("same dropout in every batch entry", "int(work.batch * args.heads) + work.head;", "work.head;"),
        ("key/value heads interleaved instead of grouped", "work.head / (args.heads / args.kv_heads)",
         "work.head % args.kv_heads"),
        ("copy of Q not waited for without keys", "if (tiles == 0) {", "if (false) {"),
    ),
    *_mutations(
        "attention.cuh",
        "attention",
        ("lse in base 2", "greatest + lg2(total) * kLn2", "greatest + lg2(total)"),
        ("lse of a row that sees no key is 0", "total == 0.0f ? -kInfinity", "total == 0.0f ? 0.0f"),
        ("lse of a row with an infinite score is NaN", "  if (greatest == kInfinity) return greatest;\n", ""),
        ("lse in the wrong base", "const float x = lse * kLog2e;", "const float x = lse;"),
        ("backward: rows without a score above -inf", "  if (lse == -kInfinity) return kInfinity;\n", ""),
        ("backward: large lse as rounded", "1.0f - 0x1p-21f : 1.0f + 0x1p-21f", "1.0f : 1.0f"),
        ("backward: P of more than 1", "ex2(min_nan(score - lse, 0.0f))", "ex2(score - lse)"),
        ("causal mask aligned top left", "work.seqlen_k - work.seqlen_q + 1", "1"),
        ("causal mask ignored", "args.causal ? work.seqlen_k - work.seqlen_q + 1 : work.seqlen_k", "work.seqlen_k"),
        ("document's rows in lse forgotten", "* args.seqlen_q + work.q_row", "* args.seqlen_q"),
        ("document's first query forgotten", "work.q_row = q_end, work.k_row = k_end;", "work.k_row = k_end;"),
        ("a tile of the documents too few", "int((kQueries ? args.seqlen_q : args.seqlen_k) / kRows + args.documents)",
         "int((kQueries ? args.seqlen_q : args.seqlen_k) / kRows + args.documents - 1)"),
        ("dropout's rows 16 apart confused", "plane, row + 16 * m, column", "plane, row, column"),
        ("dropout's groups of columns confused", "column + 32 * group);", "column);"),
        ("dropout's columns 8 apart swapped", "4 * group + 2 * i + next,", "4 * group + 2 * i + 1 - next,"),
        ("dropout's columns 16 apart swapped", "4 * group + 2 * i + next,", "4 * group + 2 * (1 - i) + next,"),
        ("dropout's rows 8 apart swapped", "next, 2 * half + j,", "next, 2 * (1 - half) + j,"),
        ("dropout's neighbouring columns swapped", "next, 2 * half + j,", "next, 2 * half + 1 - j,"),
        ("dropout: rows for columns in a byte's place", "kTransposed ? 2 * next + half : 2 * half + next", "2 * half + next"),
        ("dropout: what is dropped stays", "x[m][n][i] = keep ? x[m][n][i] : 0.0f;", ""),
        ("transposed dropout: P not dropped", "p[m][n][i] = keep ? p[m][n][i] : 0.0f;", ""),
        ("transposed dropout: dP not dropped", "dp[m][n][i] = keep ? dp[m][n][i] : 0.0f;", ""),
    ),
    *_mutations(
        "dropout.cuh",
        "attention",
        ("dropout's rows and columns transposed",
         "{kTransposed ? rows : columns, kTransposed ? columns : rows,", "{kTransposed ? columns : rows, kTransposed ? rows : columns,"),
        ("dropout: both lanes draw for the same columns", "(column / 16 + odd) * 4 + t", "column / 16 * 4 + t"),
        ("dropout: lanes do not swap", "shfl_xor(odd ? even_row : odd_row, 4)", "(odd ? even_row : odd_row)"),
        ("dropout: lanes swap the wrong halves", "shfl_xor(odd ? even_row : odd_row, 4)", "shfl_xor(odd ? odd_row : even_row, 4)"),
        ("dropout: swaps with the wrong lane", "shfl_xor(odd ? even_row : odd_row, 4)", "shfl_xor(odd ? even_row : odd_row, 8)"),
        ("dropout: halves swapped at the end", "word[0][j] = odd ? other : even_row;", "word[0][j] = odd ? even_row : other;"),
        ("dropout: transposed words as they lie", "kTransposed ? 2 * j + 1 : 2 + j", "2 + j"),
        ("dropout's bytes 0 and 2 swapped", "keep[0], keep[2], prmt", "keep[2], keep[0], prmt"),
        ("dropout's odd bytes are the even ones", "0x4341", "0x4240"),
        ("dropout's threshold one too high", "threshold * 0x10001u", "(threshold + 1) * 0x10001u"),
        ("dropout's threshold for the low half only", "threshold * 0x10001u", "threshold"),
        ("six rounds of Philox", "round < 7", "round < 6"),
        ("high half of the seed ignored", "uint32_t(seed >> 32)", "0"),
    ),
    *_mutations(
        "tile.cuh",
        "attention",
        ("rows copied without the swizzle", "const uint32_t to = offset(row, chunk);",
         "const uint32_t to = uint32_t(row * kRowBytes + chunk * 16);"),
        ("left operand read without the swizzle", "address(tile, offset(lane_index() % 16, lane_index() / 16), row, 2 * k)",
         "(tile + uint32_t((row + lane_index() % 16) * kRowBytes + (2 * k + lane_index() / 16) * 16))"),
        ("swizzle removed everywhere", "kChunks >= 8 ? chunk ^ (row % 8) : chunk ^ (row / 2 % 4)",
         "kChunks >= 8 ? chunk : chunk ^ (row / 2 % 4)"),
        ("value tile not transposed", "ldmatrix_x4_trans(d,", "ldmatrix_x4(d,"),
        ("right operand's quarters in the wrong order", "offset(lane_index() / 16 * 8 + lane_index() % 8, lane_index() / 8 % 2)",
         "offset(lane_index() / 8 % 2 * 8 + lane_index() % 8, lane_index() / 16)"),
        ("last 16 of head_dim skipped", "k < kHeadDim / 16;", "k < kHeadDim / 16 - 1;"),
        ("last columns of the output skipped", "n < kHeadDim / 16;", "n < kHeadDim / 16 - 1;"),
        ("rows past the end not zeroed", "first + row + i < end", "first + row + i <= end"),
        ("rows past the end written", "if (r < end) st_global_16", "if (r <= end) st_global_16"),
        ("accumulator's halves confused", "p[m][2 * k + i / 2][2 * (i % 2)]", "p[m][2 * k + i % 2][2 * (i / 2)]"),
        ("no warp barrier before the rows are read back", "    bar_warp_sync();\n#pragma unroll\n    for (int i = 0; i < 16 * kM",
         "#pragma unroll\n    for (int i = 0; i < 16 * kM"),
    ),
    *_mutations(
        "attention_backward.cuh",
        "attention",
        ("dK, dV: mask lets the next key through", "key >= of + visible", "key > of + visible"),
        ("dK, dV: mask hides the last visible key", "key >= of + visible", "key + 1 >= of + visible"),
        ("dK, dV: no mask", "const bool edge = row + 16 * kM > query", "const bool edge = false && row + 16 * kM > query"),
        ("dK, dV: zeros past the queries times infinite keys", " || of >= work.seqlen_q))", "))"),
        ("dK, dV: first tile of queries skipped", "maximum(work.first - visible + 1, 0) / Sizes::kQueries;",
         "maximum(work.first - visible + 1, 0) / Sizes::kQueries + 1;"),
        ("dK, dV: last tile of queries skipped", "ceil_div(work.seqlen_q, Sizes::kQueries)",
         "work.seqlen_q / Sizes::kQueries"),
        ("dK, dV: one query head of the group only", "work.head * group + step / tiles", "work.head * group"),
        ("dK, dV: barrier removed", "    bar_sync();  // this step's", "    // this step's"),
        ("dK, dV: cp.async wait removed", "    cp_async_wait<0>();\n    bar_sync();  // this step's",
         "    bar_sync();  // this step's"),
        ("dK, dV: numbers of even and odd queries swapped", "i % 2 ? odd.x : even.x", "i % 2 ? even.x : odd.x"),
        ("dK, dV: delta missing", "(ds[m][n][i] * args.dropout_scale - (i % 2 ? odd.y : even.y))", "ds[m][n][i]"),
        ("dK: scale missing", "store<T>(grad_k, args.scale,", "store<T>(grad_k, 1.0f,"),
        ("dV: dropout's scale missing", "store<T>(grad_v, args.dropout_scale,", "store<T>(grad_v, 1.0f,"),
        ("dV: not dropped", "product_columns<T, kHeadDim>(grad_v, dropped, grad_tile(stage));",
         "product_columns<T, kHeadDim>(grad_v, p, grad_tile(stage));"),
        ("dK, dV: copies not waited for without queries", "if (steps == 0) {", "if (false) {"),
        ("dK, dV: numbers past the end read", "from, inside ? 8 : 0);", "from + (inside ? 0 : 2 * (i)), 8);"),
        ("dQ: mask lets the next key through", "key >= minimum(work.seqlen_k, query + visible)",
         "key > minimum(work.seqlen_k, query + visible)"),
        ("dQ: no mask", "const bool edge = column + Sizes::kKeys > minimum(work.seqlen_k, row + visible);",
         "const bool edge = false;"),
        ("dQ: last tile of keys skipped", "ceil_div(keys, Sizes::kKeys)", "keys / Sizes::kKeys"),
        ("dQ: barrier removed", "    bar_sync();  // this tile", "    // this tile"),
        ("dQ: cp.async wait removed", "    cp_async_wait<0>();\n    bar_sync();  // this tile",
         "    bar_sync();  // this tile"),
        ("dK: dropout's scale missing", "ds[m][n][i] * args.dropout_scale - (i % 2", "ds[m][n][i] - (i % 2"),
        ("dQ: dropout's scale missing", "ds[m][n][i] * args.dropout_scale - stats", "ds[m][n][i] - stats"),
        ("dQ: delta missing", "(ds[m][n][i] * args.dropout_scale - stats[m][i / 2].y)", "ds[m][n][i]"),
        ("dQ: scale missing", "store<T>(grad_q, args.scale,", "store<T>(grad_q, 1.0f,"),
        ("dQ: not dropped", "    if (args.dropout_threshold) drop(args", "    if (false) drop(args"),
        ("dQ: numbers past the end read", "minimum(row + 16 * m + 8 * half + g, work.seqlen_q - 1)",
         "row + 16 * m + 8 * half + g"),
        ("delta of half a row", "mask < kLanes;", "mask < kLanes / 2;"),
    ),
    *_mutations(
        "hopper/attention_forward.cuh",
        "hopper_forward",
        ("no mask on the diagonal", "minimum(work.seqlen_k, row + visible)) {", "work.seqlen_k) {"),
        ("no mask at the end of the keys", "minimum(work.seqlen_k, row + visible)) {", "row + visible) {"),
        ("mask of the next query", "const int first = row + g + visible;", "const int first = row + g + visible + 1;"),
        ("mask of the query before", "const int first = row + g + visible;", "const int first = row + g + visible - 1;"),
        ("lower rows masked as the upper", "minimum(work.seqlen_k, first + 8)", "minimum(work.seqlen_k, first)"),
        ("natural exponent for the base-2 one", "args.scale * kLog2e}", "args.scale}"),
        ("K released before its wait", "        wgmma_wait<1>(s);\n        shared.k_ring.release(k_turn);",
         "        shared.k_ring.release(k_turn);\n        wgmma_wait<1>(s);"),
        ("V released before its wait", "        wgmma_wait<0>(out);\n        shared.v_ring.release(v_turn);",
         "        shared.v_ring.release(v_turn);\n        wgmma_wait<0>(out);"),
        ("Q released before the last scores", "      wgmma_wait<0>(s);\n      shared.k_ring",
         "      wgmma_wait<0>(s);\n      shared.q_ring.release(q_turn);\n      shared.k_ring"),
        ("scores not waited for", "        wgmma_wait<1>(s);", "        wgmma_wait<2>(s);"),
        ("P V waited for one group too few", "        wgmma_wait<0>(out);\n        shared", "        wgmma_wait<1>(out);\n        shared"),
        ("P packed while P V reads it", "        exponentials(tile);\n", "        exponentials(tile);\n        round_to<T>(p, s);\n"),
        ("K not waited for", "shared.k_ring.wait_full(k_turn);", ";"),
        ("V not waited for", "shared.v_ring.wait_full(v_turn);", ";"),
        ("no wgmma.fence before the scores", "wait_full(k_turn);\n      wgmma_fence();", "wait_full(k_turn);"),
        ("no wgmma.fence before P V", "wait_full(v_turn);\n      wgmma_fence();", "wait_full(v_turn);"),
        ("scores not committed", "shared.k_ring.tile(k_turn));\n      wgmma_commit();", "shared.k_ring.tile(k_turn));"),
        ("P V not committed", "shared.v_ring.tile(v_turn));\n      wgmma_commit();", "shared.v_ring.tile(v_turn));"),
        ("both warpgroups take the first rows of Q", "64 * group,\n", "0,\n"),
        ("both warpgroups write the first rows", "const int warp_row = 64 * group +", "const int warp_row ="),
        ("accumulators not rescaled", "out[n][i] *= correction[i / 2]", "out[n][i] *= 1.0f"),
        ("rows' corrections swapped", "out[n][i] *= correction[i / 2]", "out[n][i] *= correction[1 - i / 2]"),
        ("sum not rescaled", "sum[half] * correction[half]", "sum[half]"),
        ("maximum of two lanes, not four", "      highest = max_f32(highest, shfl_xor(highest, 2));\n", ""),
        ("running maximum lost", "float highest = most[half];", "float highest = -kInfinity;"),
        ("no guard for rows that see no key", "const float shift = highest == -kInfinity ? 0.0f : highest;", "const float shift = highest;"),
        ("sum of two lanes, not four", "      total += shfl_xor(total, 2);\n", ""),
        ("lse without the maximum", "log_sum_exp(softmax.most[half] * args.scale, total)", "log_sum_exp(0.0f, total)"),
        ("lse written past the end", "t == 0 && query < work.seqlen_q", "t == 0"),
        ("output written past the end", "args.out.seq_stride, work.seqlen_q - row)", "args.out.seq_stride, work.seqlen_q - row + 1)"),
        ("dropout's scale missing", "args.dropout_scale / total", "1.0f / total"),
        ("same dropout in every batch entry", "work.batch * int(args.heads) + work.head", "work.head"),
        ("key/value heads interleaved instead of grouped", "work.head / (args.heads / args.kv_heads)",
         "work.head % args.kv_heads"),
        ("first tile of keys skipped", "load_v(0);", "load_v(1);"),
        ("a warpgroup never hands on", "        next_turn();\n        wgmma_wait<1>(s);", "        wgmma_wait<1>(s);"),
        ("a warpgroup does not wait for its turn", "        my_turn();\n        issue_scores();", "        issue_scores();"),
        ("nobody starts", "if (group == Sizes::kComputing - 1) next_turn();", ""),
        ("the last turn is left over", "if (group == 0) my_turn();", ""),
        ("barriers for one reader", "shared.k_ring.init(Sizes::kComputing);", "shared.k_ring.init(1);"),
        ("barriers for three readers", "shared.v_ring.init(Sizes::kComputing);", "shared.v_ring.init(Sizes::kComputing + 1);"),
        ("barriers initialised by every thread", "if (thread_index() == 0) {", "{"),
        ("no barrier after the barriers' init", "  }\n  bar_sync();", "  }"),
        ("more registers than there are", "kComputing == 2 ? 232 : 152", "kComputing == 2 ? 240 : 152"),
    ),
    *_mutations(
        "hopper/pipeline.cuh",
        "hopper_forward",
        ("no fence.proxy.async", "    fence_proxy_async();\n", ""),
        ("fence.proxy.async after the arrival", "    fence_proxy_async();\n    bar_warp_sync();\n    if (thread % 32 == 0) mbarrier_arrive(pending);",
         "    bar_warp_sync();\n    if (thread % 32 == 0) mbarrier_arrive(pending);\n    fence_proxy_async();"),
        ("arrival before the warp's other lanes", "    fence_proxy_async();\n    bar_warp_sync();", "    fence_proxy_async();"),
        ("every lane arrives", "if (thread % 32 == 0) mbarrier_arrive(pending)", "mbarrier_arrive(pending)"),
        ("one warp arrives for all", "if (thread % 32 == 0) mbarrier_arrive(pending)", "if (thread == 0) mbarrier_arrive(pending)"),
        ("published before the copies land", "cp_async_wait<1>();", "cp_async_wait<2>();"),
        ("last tile not waited for", "    cp_async_wait<0>();\n", ""),
        ("last tile never published", "    if (!pending) return;", "    return;"),
        ("copies not committed", "    cp_async_commit();\n", ""),
        ("the next place is published", "    pending = ring.full(turn);\n    turn.next();", "    turn.next();\n    pending = ring.full(turn);"),
        ("places not waited for", "    ring.wait_empty(turn);\n", ""),
        ("full: a phase early", "mbarrier_wait(full(turn), turn.round)", "mbarrier_wait(full(turn), turn.round - 1)"),
        ("full: a phase late", "mbarrier_wait(full(turn), turn.round)", "mbarrier_wait(full(turn), turn.round + 1)"),
        ("empty: a phase early", "mbarrier_wait(empty(turn), turn.round - 1)", "mbarrier_wait(empty(turn), turn.round - 2)"),
        ("empty: a phase late", "mbarrier_wait(empty(turn), turn.round - 1)", "mbarrier_wait(empty(turn), turn.round)"),
        ("every lane releases", "if (lane_index() == 0) mbarrier_arrive(empty(turn))", "mbarrier_arrive(empty(turn))"),
        ("the wrong barrier is released", "mbarrier_arrive(empty(turn))", "mbarrier_arrive(full(turn))"),
        ("round not counted", "place = 0, ++round;", "place = 0;"),
        ("a place too many", "++place == kPlaces", "++place == kPlaces + 1"),
        ("barriers overlap", "barriers + uint32_t(16 * turn.place)", "barriers + uint32_t(8 * turn.place)"),
    ),
    *_mutations(
        "hopper/tile.cuh",
        "hopper_forward",
        ("K-major: steps of 8 columns", "32 * (k % 4)", "16 * (k % 4)"),
        ("K-major: first step everywhere", "32 * (k % 4)", "0"),
        ("stride offset of half a pattern", "kGroupBytes = 1024;", "kGroupBytes = 512;"),
        ("stride offset of two patterns", "kGroupBytes = 1024;", "kGroupBytes = 2048;"),
        ("MN-major: steps of 8 rows", "16 * 128 * k", "8 * 128 * k"),
        ("rows copied without the swizzle", "16 * (chunk ^ row % 8)", "16 * chunk"),
        ("rows past the end not zeroed", "first + row + i < end", "first + row + i <= end"),
        ("second half of the rows not copied", "i < kRows; i += kStep", "i < kRows / 2; i += kStep"),
        ("scores added to the last ones", "B::rows_operand(b, 0, k), k > 0)", "B::rows_operand(b, 0, k), true)"),
        ("scores of the last 16 columns only", "B::rows_operand(b, 0, k), k > 0)", "B::rows_operand(b, 0, k), false)"),
        ("last 16 keys skipped", "k < kK; ++k) wgmma", "k < kK - 1; ++k) wgmma"),
        ("accumulator's halves confused", "d[2 * k + i / 2][2 * (i % 2)]", "d[2 * k + i % 2][2 * (i / 2)]"),
        ("output: lanes exchange the wrong words", "shfl_xor(upper ? word[i] : word[i + bit], bit)",
         "shfl_xor(upper ? word[i + bit] : word[i], bit)"),
        ("output: two lanes exchange, not four", "bit < 4; bit *= 2", "bit < 2; bit *= 2"),
        ("output: rows past the end", "if (row < end) st_global_16", "if (row <= end) st_global_16"),
        ("output: rows' factors swapped", "factor[half] * d[n + i][2 * half]", "factor[1 - half] * d[n + i][2 * half]"),
    ),
    *_mutations(
        "hopper/schedule.cuh",
        "hopper_forward",
        ("every second tile skipped", "index += block_count()", "index += 2 * block_count()"),
        ("last tile skipped", "index < scheduled.works", "index < scheduled.works - 1"),
        ("heads of the first section only", "head = first + in_section % together", "head = in_section % together"),
        ("batch and head confused", "work.batch = head / heads, work.head = head % heads", "work.batch = head % heads, work.head = head / heads"),
        ("tiles off by one", "tiles - 1 - tile : tile) * kRows", "tiles - tile : tile) * kRows"),
    ),
    *_mutations(
        "hopper/attention.cuh",
        "hopper_forward",
        ("mask lets the next key through", "8 * n + i % 2 >= limit[i / 2]", "8 * n + i % 2 > limit[i / 2]"),
        ("last tile of keys skipped", "ceil_div(keys, kKeys)", "keys / kKeys"),
        ("last query of the tile forgotten", "minimum(last + visible_keys(args, work), work.seqlen_k)",
         "minimum(last + visible_keys(args, work) - 1, work.seqlen_k)"),
    ),
    *_mutations(
        "hopper/attention.cuh",
        "hopper_backward",
        ("dK, dV: mask lets the next key through", "8 * n + i % 2 < limit[i / 2]", "8 * n + i % 2 + 1 < limit[i / 2]"),
        ("dK, dV: mask hides the last visible key", "8 * n + i % 2 < limit[i / 2]", "8 * n + i % 2 <= limit[i / 2]"),
    ),
    *_mutations(
        "hopper/attention_backward.cuh",
        "hopper_backward",
        ("dK, dV: no mask", "if (row + 15 >= query + visible)", "if (false)"),
        ("dK, dV: mask of the warp's first key only", "if (row + 15 >= query + visible)", "if (row >= query + visible)"),
        ("dK, dV: first tile of queries skipped", "+ 1, 0) / Sizes::kQueries)", "+ 1, 0) / Sizes::kQueries + 1)"),
        ("dK, dV: last tile of queries skipped", "end(ceil_div(work.seqlen_q, Sizes::kQueries))", "end(work.seqlen_q / Sizes::kQueries)"),
        ("dK, dV: lse of even and odd queries swapped", "scale, stats[i % 2].x", "scale, stats[1 - i % 2].x"),
        ("dK, dV: delta missing", "(ds[n][i] * args.dropout_scale - stats[i % 2].y)", "(ds[n][i] * args.dropout_scale)"),
        ("dV: the neighbour dropped", "i % 2 ? 0x0000ffffu : 0xffff0000u", "i % 2 ? 0xffff0000u : 0x0000ffffu"),
        ("dV: the row 8 apart dropped", "left[n / 2][n % 2 * 2 + i / 2] &=", "left[n / 2][n % 2 * 2 + 1 - i / 2] &="),
        ("dK: not dropped", "          ds[n][i] = 0.0f;\n", ""),
        ("dK, dV: the others dropped", "if (keep) return;", "if (!keep) return;"),
        ("dK, dV: queries and keys of the mask swapped", "for_kept<true, 1, kN>", "for_kept<false, 1, kN>"),
        ("dK, dV: V's scores from K", "(ds, v_tile, 64 * group, grad_tile)", "(ds, k_tile, 64 * group, grad_tile)"),
        ("dK: scale missing", "store(grad_k, args.scale, args.grad_k)", "store(grad_k, 1.0f, args.grad_k)"),
        ("dV: dropout's scale missing", "store(grad_v, args.dropout_scale, args.grad_v)", "store(grad_v, 1.0f, args.grad_v)"),
        ("dK: dS^T packed while dV reads P^T", "      wgmma_wait<0>(grad_v);\n      rings.c.release(turn);\n      round_to<T>(left, ds);",
         "      round_to<T>(left, ds);\n      wgmma_wait<0>(grad_v);\n      rings.c.release(turn);"),
        ("dK, dV: more registers than were launched with", "kLoadingRegisters = 24, kComputingRegisters = 240", "kLoadingRegisters = 32, kComputingRegisters = 240"),
        ("dQ: more registers than were launched with", "kLoadingRegisters = 40, kComputingRegisters = 232", "kLoadingRegisters = 40, kComputingRegisters = 240"),
        ("dK, dV: Q released before its wait", "      wgmma_wait<0>(grad_k);\n      rings.b.release(turn);", "      rings.b.release(turn);\n      wgmma_wait<0>(grad_k);"),
        ("dK, dV: K released at once", "      rings.a.wait_full(k_turn);\n", "      rings.a.wait_full(k_turn);\n      rings.a.release(k_turn);\n"),
        ("dK, dV: dO not waited for", "rings.c.wait_full(turn);\n      wgmma_fence();\n      product_rows<T, typename Sizes::K", "wgmma_fence();\n      product_rows<T, typename Sizes::K"),
        ("dK, dV: Q not waited for", "rings.b.wait_full(turn);\n      wgmma_fence();\n      product_rows<T, typename Sizes::K", "wgmma_fence();\n      product_rows<T, typename Sizes::K"),
        ("dK, dV: P^T packed after the fence", "      wgmma_fence();\n      product_columns<T, typename Sizes::Q>(grad_v, left, grad_tile);",
         "      product_columns<T, typename Sizes::Q>(grad_v, left, grad_tile);"),
        ("dK, dV: one query head of the group only", "const int end = plane + tiles.heads", "const int end = plane + 1"),
        ("dV: not dropped", "          left[n / 2][n % 2 * 2 + i / 2] &= i % 2 ? 0x0000ffffu : 0xffff0000u;\n", ""),
        ("dQ: no mask", "if (column + Sizes::kKeys > minimum(work.seqlen_k, row + visible))", "if (false)"),
        ("dQ: delta missing", "(ds[n][i] * args.dropout_scale - stats[i / 2].y)", "(ds[n][i] * args.dropout_scale)"),
        ("dQ: rows' lse swapped", "scale, stats[i / 2].x", "scale, stats[1 - i / 2].x"),
        ("dQ: not dropped", "if (args.dropout_threshold) drop(", "if (false) drop("),
        ("dQ: scale missing", "const float factor[2] = {args.scale, args.scale};", "const float factor[2] = {1.0f, 1.0f};"),
        ("dQ: K released before its wait", "      wgmma_wait<0>(grad_q);\n      rings.b.release(turn);", "      rings.b.release(turn);\n      wgmma_wait<0>(grad_q);"),
        ("dQ: numbers past the end read", "minimum(row + 8 * half + g, work.seqlen_q - 1)", "row + 8 * half + g"),
        ("dQ: first tile of keys skipped", "for (int tile = tiles - 1; tile >= 0; --tile) add(", "for (int tile = tiles - 1; tile > 0; --tile) add("),
    ),
    *_mutations(
        "rotary.cuh",
        "rotary",
        ("rotary: neighbours paired", "to_float(ld_global(in + i)), y = to_float(ld_global(in + i + args.half))",
         "to_float(ld_global(in + 2 * i)), y = to_float(ld_global(in + 2 * i + 1))"),
        ("rotary: turns the wrong way", "args.inverse ? -1.0f : 1.0f", "args.inverse ? 1.0f : -1.0f"),
        ("rotary: gradient turns forward", "args.inverse ? -1.0f : 1.0f", "1.0f"),
        ("rotary: rest not copied", "if (in != out)", "if (in == out)"),
        ("rotary: positions ignored", "args.position ? ld_global(args.position + b * args.position_batch_stride + t) : t",
         "t"),
        ("rotary: positions of the first batch entry", "b * args.position_batch_stride + t", "t"),
        ("rotary: last pair skipped", "i < args.half;", "i < args.half - 1;"),
        ("rotary in runs: neighbours turned apart", "b[j] = y * c[j] + x * z;", "b[j] = y * c[j] - x * z;"),
        ("rotary in runs: first angles for every pair", "* half + i;", "* half;"),
        ("rotary in runs: rest not copied", "if (!turned && in == out) return;", "if (!turned) return;"),
        ("rotary in runs: rest turned", "  if (turned) {", "  {"),
        ("rotary in runs: rest at a wrong offset", "(turned ? half : (int(args.head_dim) - 2 * half) / 2)", "half"),
        ("rotary in runs: k's first head is q's last", "head >= args.heads[0], h =", "head > args.heads[0], h ="),
        ("rotary in runs: a token too many", "  if (b >= args.batch) return;\n", ""),
    ),
    *_mutations(
        "layer_norm.cuh",
        "layer_norm",
        ("variance around zero", "squares += (v[j] - mean) * (v[j] - mean)", "squares += v[j] * v[j]"),
        ("eps missing", "float(hidden) + args.eps)", "float(hidden))"),
        ("sum of half a warp", "mask = 16; mask > 0", "mask = 8; mask > 0"),
        ("weight missing", "* factor * w[j] + b[j]", "* factor + b[j]"),
        ("bias missing", "* factor * w[j] + b[j]", "* factor * w[j]"),
        ("a row too many", "if (row >= args.rows) return;  // a whole warp", "if (row > args.rows) return;"),
        ("dx: weight missing", "* stats.y, d[j] *= w[j];", "* stats.y;"),
        ("dx: mean kept", "(d[j] - mean_d - v[j] * mean_dn)", "(d[j] - v[j] * mean_dn)"),
        ("dx: projection on n kept", "(d[j] - mean_d - v[j] * mean_dn)", "(d[j] - mean_d)"),
        ("dx: wrong sign of the projection", "(d[j] - mean_d - v[j] * mean_dn)", "(d[j] - mean_d + v[j] * mean_dn)"),
        ("dx: residual missing", "if (residual) {", "if (false) {"),
        ("dx: residual's first columns only", "residual + i);", "residual + first);"),
        ("dweight: not normalised", "d[j] * (v[j] - stats.x) * stats.y, sums", "d[j] * (v[j] - stats.x), sums"),
        ("dweight, dbias: swapped", "i < args.hidden ? args.grad_weight : args.grad_bias",
         "i < args.hidden ? args.grad_bias : args.grad_weight"),
        ("dweight, dbias: rows skipped", "row += kNormRows)", "row += kNormRows + 1)"),
        ("dweight, dbias: chunks overlap", "begin + per_chunk < args.rows ? begin + per_chunk : args.rows", "args.rows"),
        ("dweight, dbias: first chunk skipped", "chunk = 0; chunk < args.chunks", "chunk = 1; chunk < args.chunks"),
        ("dweight, dbias: barrier removed", "  bar_sync();\n  // Now", "  // Now"),
        ("dweight, dbias: columns of the wrong lane", "place(which, p, at / 8, at % 8)", "place(which, p, at % 8, at / 8)"),
        ("dweight, dbias: columns past the end", "if (strip * kNormColumns + at < args.hidden)", "if (true)"),
    ),
    *_mutations(
        "cross_entropy.cuh",
        "loss",
        ("loss: natural exponent for the base-2 one", "ex2(x * 1.44269504088896f)", "ex2(x)"),
        ("loss: log2(e) before the maximum is taken off", "total += exp_f32(x[j] - highest)",
         "total += ex2(x[j] * 1.44269504088896f - highest * 1.44269504088896f)"),
        ("loss: maximum starts at 0", "top = -3.40282347e38f", "top = 0.0f"),
        ("loss: maximum of nothing is -inf", "top = -3.40282347e38f", "top = -__builtin_huge_valf()"),
        ("loss: sum not corrected to a new maximum", "total *= exp_f32(top - highest);", ""),
        ("loss: another thread's sum not corrected", "+ other_total * exp_f32(other_top - highest)", "+ other_total"),
        ("loss: sum of half a warp", "mask = 16; mask > 0", "mask = 8; mask > 0"),
        ("loss: last warp forgotten", "warp < kLossWarps; ++warp", "warp < kLossWarps - 1; ++warp"),
        ("loss: barrier removed", "  bar_sync();\n  if (thread", "  if (thread"),
        ("loss: one turn of columns only", "i < columns; i += 8 * kLossThreads",
         "i < columns && i < 8 * kLossThreads; i += 8 * kLossThreads"),
        ("loss: bias missing", "x[j] += shift[j];", "x[j] += 0.0f;"),
        ("loss: target's bias missing", " + to_float(ld_global(bias + target));", ";"),
        ("loss in base 2", "lg2(softmax.total) * 0.693147180559945f", "lg2(softmax.total)"),
        ("loss without the maximum", "+ (softmax.top - logit)", "- logit"),
        ("loss: ignored rows counted", "if (target == args.ignore_index) {  // the whole block", "if (false) {"),
        ("loss: targets below 0", "target >= 0 && target <", "target <"),
        ("loss: targets past the columns", "target >= 0 && target < args.columns", "target >= 0"),
        ("z-loss: not squared", "args.z_loss * lse * lse", "args.z_loss * lse"),
        ("z-loss: half the gradient", "2.0f * args.z_loss * lse", "args.z_loss * lse"),
        ("dlogits: bias missing", "exp_f32(d[j] + shift[j] - stats.x)", "exp_f32(d[j] - stats.x)"),
        ("dlogits: not divided by the sum", "- stats.x) * stats.y", "- stats.x)"),
        ("dlogits: one-hot missing", "j == hot ? 1.0f", "j == hot ? 0.0f"),
        ("dlogits: one-hot of the next column", "j == hot ?", "j == hot + 1 ?"),
        ("dlogits: ignored rows counted", "if (target != args.ignore_index) {", "{"),
        ("dlogits: ignored rows keep their logits", "    st_global_8(at, d);", "    if (target != args.ignore_index) st_global_8(at, d);"),
        ("dlogits: columns past the end", "  if (column >= args.columns) return;\n", ""),
        ("dbias: before the one-hot", "stats.y - (j == hot ? 1.0f : 0.0f);\n        sum[j] += d[j];",
         "stats.y;\n        sum[j] += d[j];\n        d[j] -= j == hot ? 1.0f : 0.0f;"),
        ("dbias: earlier chunks forgotten", "ld_global_8(sum, partial);", "for (float& x : sum) x = 0.0f;"),
        ("dbias: every part in the first's place", "args.bias_sums + index * args.columns + column", "args.bias_sums + column"),
    ),
    *_mutations(
        "dropout.cuh",
        "block",
        ("residual dropout: attention's mask", "kResidualOffset = 1", "kResidualOffset = 0"),
        ("residual dropout: mask transposed", "uint32_t(column / 8), word[1] = uint32_t(row / 2)",
         "uint32_t(row / 2), word[1] = uint32_t(column / 8)"),
        ("residual dropout: threshold one too high", "threshold * 0x10001u", "(threshold + 1) * 0x10001u"),
    ),
    *_mutations(
        "block.cuh",
        "block",
        ("q, k: wrong pairing", "{start + i, start + i + half, i}", "{start + i, start + i + dim / 2, i}"),
        ("q, k: first angles for every pair", "{start + i, start + i + half, i}", "{start + i, start + i + half, 0}"),
        ("q, k: turned the wrong way", "args.sin + at, 1.0f)", "args.sin + at, -1.0f)"),
        ("q, k: gradient turned forward", "args.sin + at, -1.0f)", "args.sin + at, 1.0f)"),
        ("q, k: bias missing", "a[j] += bias_a[j], b[j] += bias_b[j]", "b[j] += bias_b[j]"),
        ("v turned", "if (head >= args.turned_heads)", "if (head > args.turned_heads)"),
        ("last head of k not turned", "if (head >= args.turned_heads)", "if (head >= args.turned_heads - 1)"),
        ("rest of a head at a wrong offset", "rest = start + half + i;", "rest = start + i;"),
        ("positions of the first batch entry", "b * args.position_batch_stride + t) : t)", "t) : t)"),
        ("positions ignored", "(args.position ? ld_global(args.position + b * args.position_batch_stride + t) : t)", "t"),
        ("position in the batch, not in the sequence", "t = token % int(args.seq)", "t = token"),
        ("last strip of q, k, v skipped", "(args.width - args.inner) / 16 + kBlockThreads - 1) / kBlockThreads)),",
         "(args.width - args.inner) / 16) / kBlockThreads)),"),
        ("tokens past the end", "end = smaller(begin + kBlockRows, tokens)", "end = begin + kBlockRows"),
        ("u: bias missing", "gelu(u[j] + shift[j]).value", "gelu(u[j]).value"),
        ("u: q's bias", "ld_global_8(shift, bias + first_u + column);", "ld_global_8(shift, bias + column);"),
        ("u: backward without the bias", "y = gelu(u[j] + shift[j]);", "y = gelu(u[j]);"),
        ("GELU: cubic term 0.04", "cubic = 0.044715f", "cubic = 0.04f"),
        ("GELU: slope of the cubic term", "square * (6 * c * cubic)", "square * (2 * c * cubic)"),
        ("GELU: slope is the sigmoid", "value * (1.0f - sigmoid) * inner + sigmoid}", "sigmoid}"),
        ("activated keeps its gradient", "      st_global_8(activated, u);\n", ""),
        ("db_in: u before the slope", "d[j] *= y.slope, sum[j] += d[j];", "sum[j] += d[j], d[j] *= y.slope;"),
        ("last row of each chunk skipped", "end = smaller(begin + each, int(rows));",
         "end = smaller(begin + each - 1, int(rows));"),
        ("chunks overlap", "end = smaller(begin + each, int(rows));", "end = smaller(begin + each + 1, int(rows));"),
        ("last chunk skipped", "chunk = part; chunk < args.chunks", "chunk = part; chunk + 1 < args.chunks"),
        ("last part of the sums skipped", "p < kSumParts; ++p", "p < kSumParts - 1; ++p"),
        ("sums: barrier removed", "  bar_sync();\n  if (part", "  if (part"),
        ("residual: bias missing", "y[j] += bias[j];", "y[j] += 0.0f;"),
        ("residual: x missing", "y[j] += x[j];", "y[j] += 0.0f;"),
        ("residual: not dropped", "drop_residual(y, word, args, row, begin, column);", ";"),
        ("residual: gradient not dropped", "drop_residual(d, word, args, row, chunk.begin, column);", ";"),
        ("residual: gradient's mask counts rows from the chunk", "drop_residual(d, word, args, row, chunk.begin, column)",
         "drop_residual(d, word, args, row - chunk.begin, 0, column)"),
        ("residual: scale missing", "keep[j] ? args.dropout_scale", "keep[j] ? 1.0f"),
        ("residual: rows of a pair swapped", "row % 2 ? word[2 + i] : word[i]", "row % 2 ? word[i] : word[2 + i]"),
        ("residual: one draw for all rows", "row == begin || row % 2 == 0", "row == begin"),
        ("residual: pairs of rows counted from the chunk", "row == begin || row % 2 == 0", "(row - begin) % 2 == 0"),
        ("residual: fours of columns swapped", "x[4 * i + j] *=", "x[4 * (1 - i) + j] *="),
        ("residual: columns past the end", "  if (column >= args.columns) return;\n  float bias[8];", "  float bias[8];"),
        ("residual: gradient's columns past the end", "  if (column >= args.columns) return;\n  float sum[8] = {};\n  uint32_t",
         "  float sum[8] = {};\n  uint32_t"),
        ("residual: gradient not written", "      st_global_8(static_cast<T*>(args.h) + at, d);\n", ""),
    ),
]  # fmt: skip

# A few small calls that touch everything: masks, edges, blind rows, groups, dropout, documents, several tiles.
ATTENTION = [
    Case("mutants_causal", batch=2, seqlen_q=40, seqlen_k=70, heads=2, kv_heads=1, dropout_p=0.25),
    Case("mutants_tall", batch=1, seqlen_q=140, seqlen_k=129, heads=1, kv_heads=1),
    Case("mutants_documents", batch=1, heads=4, kv_heads=2, documents=((5, 90), (40, 20), (4, 0), (0, 9), (33, 33))),
    Case("mutants_blind", batch=1, seqlen_q=139, seqlen_k=3, heads=1, kv_heads=1),
    Case("mutants_full", batch=1, seqlen_q=100, seqlen_k=150, heads=1, kv_heads=1, causal=False, dropout_p=0.5),
]  # fmt: skip


def _check_attention(module: ModuleType) -> None:
    for case in ATTENTION:
        emulator.check_attention(case, torch.bfloat16)
    check_extreme_scores("cuda", torch.bfloat16)
    counters = module.counters()
    assert counters["shared_wavefronts"] == counters["shared_wavefronts_least"], "bank conflicts"


# The hopper kernels' tiles are 128 x 128, in blocks that take several: more rows, several tiles for each of 3 blocks.
HOPPER = [
    Case("mutants_causal", batch=3, seqlen_q=140, seqlen_k=300, heads=2, kv_heads=1, dropout_p=0.25),
    Case("mutants_peaked", batch=1, seqlen_q=20, seqlen_k=300, heads=1, kv_heads=1, causal=False, magnitude=100.0),
    Case("mutants_corner", batch=1, seqlen_q=140, seqlen_k=141, heads=1, kv_heads=1),
    Case("mutants_documents", batch=1, heads=4, kv_heads=2, documents=((5, 90), (40, 20), (4, 0), (0, 9), (133, 133))),
    Case("mutants_blind", batch=1, seqlen_q=139, seqlen_k=3, heads=1, kv_heads=1),
    Case("mutants_full", batch=1, seqlen_q=100, seqlen_k=550, heads=1, kv_heads=1, causal=False, dropout_p=0.5),
]  # fmt: skip


def _check_hopper(module: ModuleType, backward: bool) -> None:
    for seed in range(2):
        module.set_seed(seed)
        for case in HOPPER:
            emulator.check_attention(case, torch.bfloat16, version="cuda/hopper_backward", backward=backward)
    counters = module.counters()
    assert counters["shared_wavefronts"] == counters["shared_wavefronts_least"], "bank conflicts"


def _check_rotary(module: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 3, heads, 64, generator=generator).to(torch.bfloat16) for heads in (9, 2))
    where = torch.randint(32, (2, 3), generator=generator)
    for dims, positions, inverse in itertools.product(
        (36, 16, 32), (None, where), (False, True)
    ):  # by element, in runs
        cos, sin = reference.rotary_table(32, dims)
        ours = torch.ops.phi1.rotary(q, k, cos, sin, positions, inverse, "cuda")
        for x, y in zip(ours, reference.rotary(q, k, cos, sin, positions, inverse), strict=True):
            torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-6)


def _check_layer_norm(module: ModuleType) -> None:
    for shape in ((3, 64), (70, 264), (1100, 8)):  # the last with more rows a chunk than a block's threads take at once
        check_layer_norm(shape, torch.bfloat16)
    check_equal_numbers()


BLOCK = [
    cuda_block_cases.Case("mutants_rows", batch=3, seq=45, heads=1, hidden=8, inner=8, positions="batch"),
    cuda_block_cases.Case("mutants_wide", batch=2, seq=3, heads=24, kv_heads=6, head_dim=64, rotary=32, inner=48),
]


def _check_block(module: ModuleType) -> None:
    for case in BLOCK:
        cuda_block_cases.check_projection_in(case, torch.bfloat16)
    cuda_block_cases.check_projection_out(135, 40, 0.3, torch.bfloat16)


def _check_loss(module: ModuleType) -> None:
    # Ignored rows, parts of a chunk; 2 parts of the rows; more columns than a block takes in a turn.
    for shape, rows in (((13, 16, 72), 7), ((40, 8, 1032), 33), ((3, 8, 4112), 7)):
        check_loss(shape, torch.bfloat16, chunk_rows=rows)
    check_loss((13, 16, 72), torch.bfloat16, z_loss=0.1)
    check_extremes(torch.bfloat16)
    check_wrong_targets()
    check_parts(module)


KERNELS: dict[str, tuple[tuple[str, ...], Callable[[ModuleType], None]]] = {
    "attention": (("attention_forward.cu", "attention_backward.cu"), _check_attention),
    "hopper_forward": (("hopper/attention_forward.cu",), functools.partial(_check_hopper, backward=False)),
    "hopper_backward": (("hopper/attention_backward.cu",), functools.partial(_check_hopper, backward=True)),
    "rotary": (("rotary.cu",), _check_rotary),
    "layer_norm": (("layer_norm.cu",), _check_layer_norm),
    "block": (("block.cu",), _check_block),
    "loss": (("cross_entropy.cu",), _check_loss),
}
"""Sources, and a check that they do what they should."""
SOURCES = tuple(source for sources, _ in KERNELS.values() for source in sources)


def _killed_by(module: ModuleType, mutation: Mutation | None) -> str | None:
    """The first line of what goes wrong, or None. What `torch.empty` gives is NaN, not by chance the right zeros."""
    module.reset_counters()
    torch.use_deterministic_algorithms(True)
    try:
        with emulator.as_cuda_backend(module):
            for name, (_, check) in KERNELS.items():
                if mutation is None or mutation.kernels == name:
                    check(module)
    except (AssertionError, RuntimeError) as error:
        return str(error).splitlines()[0]
    finally:
        torch.use_deterministic_algorithms(False)
    return None


FLAGS = ("-std=c++20", "-O1", "-march=native", "-fPIC", "-fvisibility=hidden", "-DPHI1_EMULATOR", "-DPHI1_ONE_INSTANCE")
PREFIX = "".join(f"#include <{name}>\n" for name in ("cstdint", "functional", "stdexcept", "string", "vector"))
"""What every source includes, compiled once: 0.25 s less for each, of 0.55 s (measured, GCC 12)."""


def _run(*command: str | pathlib.Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _build(folder: pathlib.Path, objects: list[pathlib.Path], mutation: Mutation | None) -> pathlib.Path:
    """The emulator module of a mutated copy of csrc/cuda; `objects` are those of the unmutated sources."""
    shutil.copytree(CUDA, folder / "cuda")
    sources = SOURCES
    if mutation is not None:
        target = folder / "cuda" / mutation.file
        text = target.read_text()
        found = text.count(mutation.old)
        assert found == 1, f"{mutation.file}: {mutation.old!r} occurs {found} times, not once"
        target.write_text(text.replace(mutation.old, mutation.new))
        sources = KERNELS[mutation.kernels][0]
    built = []
    for source in sources:
        built.append(folder / (source.replace("/", "-") + ".o"))
        includes = ("-include", folder.parent / "prefix.h", f"-I{folder}", f"-I{CUDA.parent}")
        _run("c++", *FLAGS, *includes, "-xc++", "-c", folder / "cuda" / source, "-o", built[-1])
    kept = [x for x in objects if x.name not in {y.name for y in built}]
    module = folder / "_emulator.so"
    _run("c++", "-shared", "-o", module, *built, *kept)
    return module


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """A folder to work in and the object files of the unmutated module."""
    emulator.build()
    folder = tmp_path_factory.mktemp("mutants")
    (folder / "prefix.h").write_text(PREFIX)
    _run("c++", *FLAGS, "-xc++-header", folder / "prefix.h", "-o", folder / "prefix.h.gch")
    every = list((emulator.BUILD / "CMakeFiles").rglob("*.o"))
    others = [
        x for x in every if not x.as_posix().endswith(tuple(f"/cuda/{source}.o" for source in SOURCES))
    ]  # one instance only
    _build(folder / "control", others, None)
    return folder, others + sorted((folder / "control").glob("*.o"))


@pytest.fixture(scope="module")
def killed(request: pytest.FixtureRequest) -> Iterator[list[bool]]:
    """Of each mutant that was run; the total is printed at the end."""
    results: list[bool] = []
    yield results
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nCUDA mutants killed: {sum(results)}/{len(results)}", file=sys.stderr)


def test_the_unmutated_kernels_pass(control: tuple[pathlib.Path, list[pathlib.Path]]) -> None:
    folder, _ = control
    assert _killed_by(emulator.load(folder / "control" / "_emulator.so"), None) is None


def test_every_mutation_changes_one_place() -> None:
    for mutation in MUTATIONS:
        assert (CUDA / mutation.file).read_text().count(mutation.old) == 1, f"{mutation.file}: {mutation.what}"


@pytest.mark.parametrize(
    "mutation",
    MUTATIONS if os.environ.get("PHI1_MUTANTS") == "all" else MUTATIONS[::3],
    ids=lambda m: f"{m.file}: {m.what}",
)
def test_mutant_is_killed(mutation: Mutation, control, killed: list[bool]) -> None:
    folder, objects = control
    module = emulator.load(_build(folder / str(MUTATIONS.index(mutation)), objects, mutation))
    reason = _killed_by(module, mutation)
    killed.append(reason is not None)
    assert reason is not None, f"{mutation.file}: no test notices: {mutation.what}"
