"""Mutants of the kernels for values, and of what affine.h has for them."""

from __future__ import annotations

from mutant_texts import Mutant

DEQUANTIZE = [
    Mutant("dequantize.metal", *texts)
    for texts in (
        ("words of expert 0", "expert * shape.packed_expert + ", ""),
        ("scales of expert 0", "expert * shape.scales_expert + ", ""),
        (
            "rows of words side by side",
            "n * shape.packed_row",
            "n * shape.k * BITS / 32",
        ),
        (
            "rows of scales side by side",
            "n * shape.scales_row",
            "n * shape.k / GROUP_SIZE",
        ),
        ("first scale for all", "chunk / (GROUP_SIZE / 16);", "0;"),
        ("scale of the next group", "/ (GROUP_SIZE / 16);", "/ (GROUP_SIZE / 16) + 1;"),
        ("result of expert 0", "(expert * shape.n + n) * shape.k", "n * shape.k"),
        ("permutation of expert 0", "expert * shape.k + chunk * 16", "chunk * 16"),
        ("permutation ignored", "= permutation[i];", "= chunk * 16 + i;"),
        ("a column past K", "column < shape.k", "column <= shape.k"),
        ("a column before 0", "column >= 0 && ", ""),
        ("biases for scales", "float(scales[group])", "float(biases[group])"),
        ("next chunk", "words, y + chunk * 16", "words, y + chunk * 16 + 16"),
    )
]

EMBEDDING = [
    Mutant("embedding.metal", *texts)
    for texts in (
        ("one row too many", "n >= shape.n", "n > shape.n"),
        ("negative ids taken", "n < 0 || ", ""),
        ("first id for all", "ids[position.y]", "ids[0]"),
        (
            "rows of words side by side",
            "n * shape.packed_row",
            "n * shape.k * BITS / 32",
        ),
        (
            "rows of scales side by side",
            "n * shape.scales_row",
            "n * shape.k / GROUP_SIZE",
        ),
        ("first scale for all", "chunk / (GROUP_SIZE / 16);", "0;"),
        ("scale of the next group", "/ (GROUP_SIZE / 16);", "/ (GROUP_SIZE / 16) + 1;"),
        ("results in the rows of W", "long(position.y) * shape.k", "n * shape.k"),
        ("zeros for no row", "X(NAN)", "X(0.0f)"),
        ("half a row of NaN", "i < 16;", "i < 8;"),
    )
]

QUANTIZE = [
    Mutant("quantize.metal", *texts)
    for texts in (
        (
            "neighbours of a vector swapped",
            "values[i + 2] = float(four.z)",
            "values[i + 2] = float(four.y)",
        ),
        (
            "neighbours of a pair swapped",
            "values[1] = float(two.y)",
            "values[1] = float(two.x)",
        ),
        ("wide loads of any offset", "X_VECTOR && PER % 4 == 0", "PER % 4 == 0"),
        ("wide loads of any offset, pairs", "X_VECTOR && PER == 2", "PER == 2"),
        (
            "least of half the lanes",
            "int step = LANES / 2;",
            "int step = LANES / 4;",
            0,
        ),
        ("least of both groups", "int step = LANES / 2;", "int step = 16;", 0),
        (
            "first of half the lanes",
            "int step = LANES / 2;",
            "int step = LANES / 4;",
            1,
        ),
        ("infinite weights pass", "finite ? values[i] : INFINITY", "values[i]"),
        (
            "NaN for the least",
            "finite ? values[i] : 0.0f",
            "values[i]",
            None,
            "the largest is infinite then, and the scale with it: the host raises",
        ),
        ("largest begins at zero", "float high = -INFINITY;", "float high = 0.0f;"),
        ("zeros without a sign", "? -abs(low) : abs(low)", "? abs(low) : abs(low)"),
        ("last of the zeros", "lane * PER + i) * 2", "(31 - lane) * PER + i) * 2"),
        ("one step more", "float(MASK), 1e-7f", "float(MASK + 1), 1e-7f"),
        (
            "no smallest scale",
            "max((high - low) / float(MASK), 1e-7f)",
            "(high - low) / float(MASK)",
        ),
        ("the other end met", "abs(low) > abs(high)", "abs(low) < abs(high)"),
        ("the end of two alike", "abs(low) > abs(high)", "abs(low) >= abs(high)"),
        ("halves away from zero, scales", "rint(edge / scale)", "round(edge / scale)"),
        (
            "halves away from zero, codes",
            "rint((value - scale.y) / scale.x)",
            "round((value - scale.y) / scale.x)",
        ),
        ("bias kept without steps", "float2(scale, 0.0f)", "float2(scale, edge)"),
        ("scale not stretched", "float2(edge / steps, edge)", "float2(scale, edge)"),
        ("codes past the mask", "min(code, float(MASK))", "code"),
        (
            "codes below zero",
            "code > 0.0f ? uint(min(code, float(MASK))) : 0u",
            "uint(int(min(code, float(MASK))))",
            None,
            "rounded, they are not below zero; where there is a NaN the host raises",
        ),
        (
            "product with the inverse",
            "(value - scale.y) / scale.x",
            "(value - scale.y) * (1.0f / scale.x)",
        ),
        ("an owner less", "i < OWNERS;", "i < OWNERS - 1;"),
        ("upper half of wide lanes", "if (WIDTH > 32) {", "if (false) {"),
        (
            "bits before the word lost",
            "shift < 0 ? uint(bits >> -shift)",
            "shift < 0 ? 0u",
        ),
        (
            "lanes past the last",
            "owner < 32 && shift < 32",
            "shift < 32",
            None,
            "a word that has bits of lane 32 is not stored",
        ),
        (
            "groups past the end",
            "if (simdgroup * GROUPS >= groups)",
            "if (simdgroup * GROUPS > groups)",
            None,
            "a simdgroup without groups stores nothing",
        ),
        (
            "no half simdgroup",
            "const bool exists = group < groups;",
            "const bool exists = true;",
        ),
        (
            "scales by every lane",
            "if (exists && lane % LANES == 0)",
            "if (exists)",
        ),
        ("scale of one lane in two groups", "lane % LANES == 0", "lane == 0"),
        (
            "rows of the grid overlap",
            "long(position.y) * (threads.x / 32)",
            "long(position.y)",
        ),
        (
            "words of a group that is not there",
            "int(min(groups - simdgroup * GROUPS, long(GROUPS))) * WIDTH / GROUPS",
            "WIDTH",
        ),
        (
            "the first 32 words only",
            "base < WIDTH; base += 32",
            "base < 32; base += 32",
        ),
        ("words stored past the group", "if (word < words)", "if (word <= words)"),
        ("codes of all alike", "<< (i * BITS)", "<< ((PER - 1 - i) * BITS)"),
        (
            "weights of the next simdgroup",
            "(simdgroup * 32 + lane) * PER",
            "(simdgroup * 32 + 31 - lane) * PER",
        ),
    )
]

ROUNDING = [
    Mutant("affine.h", *texts, values=True)
    for texts in (
        (
            "rounded twice",
            "X(made_odd(nearest, rest) * values.up)",
            "X(nearest * values.up)",
        ),
        (
            "odd on the other side",
            "(nearest > 0.0f) ? bits + 1",
            "(nearest < 0.0f) ? bits + 1",
        ),
        ("odd though exact", "rest == 0.0f || ", ""),
        ("odd made even", "|| (bits & 1u) == 1u", ""),
        ("a part of the rest", "(a - (sum - other)) + (b - other)", "b - other"),
        ("the other part", "(a - (sum - other)) + (b - other)", "a - (sum - other)"),
        (
            "rest of a half scale for all",
            "!is_same<Scale, float>::value) {\n        return",
            "true) {\n        return",
        ),
        (
            "lowest bits lost",
            "return near + rest_of_sum(bias, low, rest);",
            "return near;",
        ),
        (
            "low product lost",
            "const float low = fma(code, scale, -product);",
            "const float low = 0.0f;",
        ),
        ("not scaled down", "abs(scale) > 1e30f && abs(bias) > 1e30f", "false"),
        ("not scaled up again", "* values.up);", ");"),
        (
            "weights of a vector swapped",
            "four.z = value_of(values, code_at(words, i + 2));",
            "four.z = value_of(values, code_at(words, i + 1));",
        ),
    )
]
