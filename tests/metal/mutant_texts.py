"""What `mutants.py` changes in the sources, one text at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change of one source.

    place: which of several occurrences of `old`, from 0; None: there is one; -1: all.
    equivalent: why nothing can tell the mutant from the source.
    values: run the tests of values rather than products (affine.h has both).
    """

    source: str
    what: str
    old: str
    new: str
    place: int | None = None
    equivalent: str = ""
    values: bool = False

    def applied(self, text: str) -> str:
        count = text.count(self.old)
        if count == 0 or (self.place is None and count != 1):
            raise ValueError(f"{self.source}: {count} times {self.old!r}")
        if self.place == -1:
            return text.replace(self.old, self.new)
        pieces = text.split(self.old)
        at = (self.place or 0) + 1
        return self.old.join(pieces[:at]) + self.new + self.old.join(pieces[at:])


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
NONE = "threadgroup_barrier(mem_flags::mem_none);"
DEVICE = "threadgroup_barrier(mem_flags::mem_device);"
NARROW = "simdgroup_barrier(mem_flags::mem_threadgroup);"


def barriers(source: str, *names: str) -> list[Mutant]:
    """Each barrier removed, for no memory, and for one simdgroup."""
    found = []
    for place, name in enumerate(names):
        at = place if len(names) > 1 else None
        found += [
            Mutant(source, f"{name}: no barrier", BARRIER, "", at),
            Mutant(source, f"{name}: barrier for no memory", BARRIER, NONE, at),
            Mutant(source, f"{name}: barrier of a simdgroup", BARRIER, NARROW, at),
        ]
    found.append(Mutant(source, "barriers for device memory", BARRIER, DEVICE, -1))
    return found


def expert_steps(source: str, of: str, left: str = "") -> list[Mutant]:
    """Each stride along experts ignored, or wrong."""
    lines = {
        "words": f"{left}packed += {of} * shape.packed_expert;",
        "scales": f"{left}scales += {of} * shape.scales_expert;",
        "biases": f"{left}biases += {of} * shape.scales_expert;",
        "permutation": f"permutation += PERMUTED ? {of} * shape.k : 0;",
    }
    found = [Mutant(source, f"{k} of expert 0", line, "") for k, line in lines.items()]
    packed = lines["words"]
    wrong = packed.replace("shape.packed_expert", "shape.n * shape.packed_row")
    return [*found, Mutant(source, "experts' words side by side", packed, wrong)]


GEMV = [
    *barriers("gemv.metal", "parts"),
    *expert_steps("gemv.metal", "expert", "rows."),
    *(
        Mutant("gemv.metal", *texts)
        for texts in (
            ("last part of K dropped", "other < SPLIT;", "other < SPLIT - 1;"),
            ("first part for all", "parts[(simdgroup + other)", "parts[(simdgroup)"),
            ("all parts store", "if (part == 0 && lane == 0)", "if (lane == 0)"),
            ("rows of x side by side", "x += m * shape.x_row", "x += m * shape.k"),
            ("one output too many", "if (r < rows.count)", "if (r <= rows.count)"),
            (
                "ragged rows taken for whole",
                "if (rows.count == ROWS)",
                "if (rows.count > 0)",
            ),
            ("one run too many", "if (run < runs.y)", "if (run <= runs.y)"),
            ("steps of a block dropped", "step < STEPS &&", "step < 1 &&"),
            ("blocks overlap", "block += 32 * STEPS", "block += 32"),
            ("half run taken for whole", "half_run && i >= 16", "false"),
            (
                "first scale for both halves",
                "scales[r * HALVES + i * HALVES / 32]",
                "scales[r * HALVES]",
            ),
            ("scale not divided by the place", "unplaced(pair.x, i + j)", "pair.x"),
            ("channels swapped", "fma(values[j], weight", "fma(values[7 - j], weight"),
            (
                "bias of the first row",
                "bias_at(bias, shape, m, n + r)",
                "bias_at(bias, shape, m, n)",
            ),
            (
                "bias of x's first row",
                "bias_at(bias, shape, m, n + r)",
                "bias_at(bias, shape, 0, n + r)",
                None,
                "M is 1, but with experts, which have no bias",
            ),
            ("lanes not summed up", "simd_sum(totals[r])", "totals[r]"),
            ("wrong row of y", "y[m * shape.n + n + r]", "y[m * shape.k + n + r]"),
            (
                "all four outputs of a row without expert",
                "int(lane) < rows.count",
                "lane < 4",
            ),
            (
                "absent rows computed",
                "if (!WHOLE && r >= rows)",
                "if (false)",
                None,
                "what is computed of rows that are not there is not stored",
            ),
        )
    ),
]

GEMV_SMALL = [
    *barriers("gemv_small.metal", "parts"),
    *(
        Mutant("gemv_small.metal", *texts)
        for texts in (
            ("last part of K dropped", "part < SPLIT;", "part < SPLIT - 1;"),
            (
                "first simdgroup for all",
                "(simdgroup + part) * OUTPUTS",
                "part * OUTPUTS",
            ),
            ("rows of x side by side", "v * shape.x_row", "v * shape.k"),
            ("one row of x for all", "v * shape.x_row", "0 * shape.x_row"),
            ("one output too many", "if (r < rows.count)", "if (r <= rows.count)"),
            (
                "ragged rows taken for whole",
                "if (rows.count >= ROWS)",
                "if (rows.count > 0)",
            ),
            ("one run too many", "if (run < runs.y)", "if (run <= runs.y)"),
            ("steps of a block dropped", "step < STEPS &&", "step < 1 &&"),
            ("blocks overlap", "block += 32 * STEPS", "block += 32"),
            ("half run taken for whole", "half_run && i >= 16", "false"),
            (
                "first scale for both halves",
                "scales[r * HALVES + i * HALVES / 32]",
                "scales[r * HALVES]",
            ),
            ("scale not divided by the place", "unplaced(pair.x, i + j)", "pair.x"),
            ("weights of the first row", "weights[r * 8 + j], sum", "weights[j], sum"),
            (
                "bias of x's first row",
                "bias_at(bias, shape, m, n + r)",
                "bias_at(bias, shape, 0, n + r)",
            ),
            (
                "outputs transposed",
                "const int r = i / VECTORS;",
                "const int r = i % ROWS;",
            ),
            (
                "the first simdgroup's outputs only",
                "if (simdgroup % SPLIT == 0)",
                "if (simdgroup == 0)",
            ),
            ("two rows where four are", "VECTORS > 4 ? 2 : 4", "VECTORS > 4 ? 2 : 2"),
            (
                "absent rows' words not set",
                "        words[i] = 0;\n",
                "",
                None,
                "what is computed of rows that are not there is not stored",
            ),
        )
    ),
]

GEMV_N = [
    *barriers("gemv_n.metal", "parts"),
    *expert_steps("gemv_n.metal", "expert"),
    *(
        Mutant("gemv_n.metal", *texts)
        for texts in (
            (
                "second half of the lanes not summed up",
                "        total += simd_shuffle_xor(total, ushort(16));\n",
                "",
            ),
            (
                "neighbours not summed up",
                "        total += simd_shuffle_xor(total, ushort(8));\n",
                "",
            ),
            ("one row of W too many", "n < shape.n;", "n <= shape.n;"),
            ("every other step of rows", "n += SIMDGROUPS * 4", "n += SIMDGROUPS * 8"),
            ("one column too many", "if (column < shape.k)", "if (column <= shape.k)"),
            ("last simdgroup dropped", "part < SIMDGROUPS;", "part < SIMDGROUPS - 1;"),
            (
                "permutation ignored",
                "PERMUTED ? long(permutation[column]) : column",
                "column",
            ),
            ("rows of x of expert 0", "    x += m0 * shape.x_row;\n", ""),
            ("rows of x side by side", "v * shape.x_row", "v * shape.n"),
            ("columns of x side by side", "n * shape.x_column", "n"),
            ("one row of y", "(m0 + i / 128) * shape.k", "m0 * shape.k"),
            ("columns mirrored", "lane * 16 + i % 16", "lane * 16 + 15 - i % 16"),
            ("all lanes store", "if (lane < 8)", "if (lane < 16)"),
            (
                "no end of a row without expert",
                "i < 128 && k0 + i < shape.k",
                "i < 128",
            ),
            ("columns of the next lane", "lane % 8 * 16", "(lane + 1) % 8 * 16"),
        )
    ),
]


def tiles(source: str) -> list[Mutant]:
    """What both kernels with tiles have."""
    return [
        *barriers(
            source, "before staging", "after staging", "before sums", "after sums"
        ),
        *expert_steps(source, "tile.expert"),
        *(
            Mutant(source, *texts)
            for texts in (
                ("last part dropped", "other < SPLIT;", "other < SPLIT - 1;"),
                ("all parts store", "if (part > 0)", "if (false)"),
                ("tile past the rows", "min(first + BM, shape.m)", "first + BM"),
                (
                    "order of rows of y ignored",
                    "GATHERED ? long(order[m]) : m",
                    "m",
                    -1,
                ),
                ("blocks not kept", "totals[2 * i] +=", "totals[2 * i] ="),
                ("blocks not begun", "[1] = 0.0f;", "[1] += 0.0f;"),
                ("one long sum in float", "is_same<X, float>::value", "false"),
                (
                    "padding of x",
                    "(sizeof(X) == 4 ? 4 : 8)",
                    "16",
                    None,
                    "it keeps rows in different banks; results do not depend on it",
                ),
                ("padding that rows overlap", "(sizeof(X) == 4 ? 4 : 8)", "-2"),
            )
        ),
    ]


GEMM = [
    *tiles("gemm.metal"),
    *(
        Mutant("gemm.metal", *texts)
        for texts in (
            ("tail of K dropped", "k0 < int(shape.k);", "k0 + BK <= int(shape.k);"),
            (
                "one block too many",
                "k0 < int(shape.k);",
                "k0 < int(shape.k) + BK;",
                None,
                "what lies past K is zero, on both sides",
            ),
            ("x past K", "k0 + k < int(shape.k)", "true"),
            ("x past K, by one", "k0 + k < int(shape.k)", "k0 + k <= int(shape.k)"),
            ("x past the tile", "tile.first + m < tile.end", "true"),
            (
                "order of rows of x ignored",
                "GATHERED ? long(order[tile.first + m]) : tile.first + m",
                "tile.first + m",
            ),
            ("rows of x side by side", "row * shape.x_row", "row * shape.k"),
            ("columns staged swapped", "2 * 8 + k / 16", "2 * 8 + 3 - k / 16"),
            ("two columns swapped", "+ k % 2;", "+ 1 - k % 2;"),
            ("part of K for all", "k0 + 64 * part + 16 * pair", "k0 + 16 * pair"),
            ("codes of the next lane", "+ 16 * pair;", "+ 16 * (3 - pair);"),
            ("one row of W for all tiles", "n + 8 * i + row, k", "n + row, k"),
            ("one output too many", "if (out >= shape.n)", "if (out > shape.n)"),
            ("rows past the tile", "if (m < tile.end)", "if (m <= tile.end)"),
            (
                "bias of x's first row",
                "bias_at(bias, shape, to, out)",
                "bias_at(bias, shape, 0, out)",
            ),
            (
                "bias of the first output",
                "bias_at(bias, shape, to, out)",
                "bias_at(bias, shape, to, n)",
            ),
            ("rows of a pair swapped", "2 * pair + j % 2", "2 * pair + 1 - j % 2"),
            ("block of x of part 0", "(64 * part + row) * LD", "row * LD"),
            ("sums of another tile", "other * 64 * N_TILES", "other * 32 * N_TILES"),
        )
    ),
]

GEMM_N = [
    *tiles("gemm_n.metal"),
    *(
        Mutant("gemm_n.metal", *texts)
        for texts in (
            ("tail of N dropped", "n0 < shape.n;", "n0 + BN <= shape.n;"),
            (
                "one block too many",
                "n0 < shape.n;",
                "n0 < shape.n + BN;",
                None,
                "what lies past N is zero, on both sides",
            ),
            ("x past N", "m < tile.end && n < shape.n", "m < tile.end"),
            ("x past N, by one", "n < shape.n)", "n <= shape.n)"),
            ("x past the tile", "m < tile.end && n < shape.n", "n < shape.n"),
            ("rows of x side by side", "row * shape.x_row", "row * shape.n"),
            ("columns of x side by side", "n * shape.x_column", "n"),
            ("last rows of a block dropped", "block < BN / 8;", "block < BN / 8 - 1;"),
            ("rows past the tile", "if (m >= tile.end)", "if (m > tile.end)"),
            ("columns past K", "if (k >= shape.k)", "if (k > shape.k)"),
            (
                "permutation ignored",
                "PERMUTED ? long(permutation[k + i]) : k + i",
                "k + i",
            ),
            ("columns swapped", "[i % 2]);", "[1 - i % 2]);"),
            (
                "columns of another lane",
                "* 64 + 16 * pair;",
                "* 64 + 16 * (3 - pair);",
                None,
                "lanes load and store the columns of one another",
            ),
            ("every part at the first row", "int block = part;", "int block = 0;"),
            ("values of the first tile", "(8 * j + row) * LD", "row * LD"),
            ("sums of another matrix", "other * 64 * 8 *", "other * 32 * 8 *"),
        )
    ),
]

AFFINE = [
    Mutant("affine.h", *texts)
    for texts in (
        ("mask one bit too narrow", "(1u << BITS) - 1u", "((1u << BITS) - 1u) >> 1"),
        (
            "words of a vector swapped",
            "words[i + 2] = four.z;",
            "words[i + 2] = four.y;",
        ),
        ("words of a pair swapped", "words[i + 1] = two.y;", "words[i + 1] = two.x;"),
        ("rows taken for aligned", "ALIGNED && COUNT % 4 == 0", "COUNT % 4 == 0"),
        ("pairs taken for aligned", "ALIGNED && COUNT % 2 == 0", "COUNT % 2 == 0"),
        (
            "half words side by side",
            "uint(from[i + 1]) << 16",
            "uint(from[i + 1]) << 15",
        ),
        ("a half word too many", "if (i + 1 < BITS) {", "if (true) {"),
        ("next 16 codes", "row + chunk * (BITS / 2)", "row + (chunk + 1) * (BITS / 2)"),
        ("bits of the next word lost", "words[word + 1] << (32 - shift)", "0u"),
        ("bits of the next word shifted", "<< (32 - shift);", "<< (31 - shift);"),
        ("place of code 16", "if (shift < 16) {", "if (shift <= 16) {"),
        ("place of the upper half", "shift % 16;", "shift;"),
        (
            "permutation of x ignored",
            "PERMUTED ? long(permutation[k]) : long(k)",
            "long(k)",
        ),
        ("columns of x side by side", "* shape.x_column;", ";"),
        (
            "two channels swapped",
            "load_pair(words.y, values + 2)",
            "load_pair(words.z, values + 2)",
        ),
        (
            "bfloat halves swapped",
            "as_type<float>(word << 16)",
            "as_type<float>(word & 0xffff0000u)",
        ),
        (
            "x taken for aligned",
            "X_VECTOR && !PERMUTED && sizeof(X) == 2",
            "!PERMUTED && sizeof(X) == 2",
        ),
        ("wide loads though permuted", "X_VECTOR && !PERMUTED)", "X_VECTOR)"),
        ("row stride of the bias", "m * shape.bias_row +", ""),
        ("column stride of the bias", "n * shape.bias_column", "n"),
        (
            "row stride of scales",
            "scales + n * shape.scales_row;",
            "scales + n * (shape.k / GROUP_SIZE);",
        ),
        (
            "row stride of biases",
            "biases + n * shape.scales_row;",
            "biases + n * (shape.k / GROUP_SIZE);",
        ),
        (
            "row stride of words",
            "packed + n * shape.packed_row;",
            "packed + n * (shape.k * BITS / 32);",
        ),
        ("rows past N", "min(long(most), shape.n - n)", "min(long(most), shape.n)"),
        ("last half run dropped", "(int(shape.k) + 31) / 32", "int(shape.k) / 32"),
        ("parts past K", "min(begin + share, runs)", "begin + share"),
        ("parts within a block", "/ (parts * UNIT) * UNIT", "/ parts"),
        ("no half runs", "run * 32 + 16 == int(shape.k)", "false"),
        ("a scale too many", "group < groups &&", "group <= groups &&"),
        ("scales of rows that are not there", "(WHOLE || r < rows.count)", "true"),
        (
            "the next scale",
            "shape.scales_row + group;",
            "shape.scales_row + group + 1;",
        ),
        ("scale without its group", "shape.scales_row + group;", "shape.scales_row;"),
        ("scales of the next part", "min(int(shape.k), end * 32)", "int(shape.k)"),
        ("second 32 scales of 16", "first + 32 * h", "first"),
        ("halves shared as one", "lane < 16 ? low : high", "low"),
        (
            "scale of the first step",
            "ushort((32 * step + lane) / STEPS)",
            "ushort(lane / STEPS)",
        ),
        (
            "half run's words past the row",
            "load_words<BITS / 2>(from, words",
            "load_words<BITS>(from, words",
        ),
        (
            "words of rows that are not there",
            "if (!WHOLE && r >= rows.count)",
            "if (false)",
        ),
        ("words of the next run", "+ run * BITS;", "+ (run + 1) * BITS;"),
        (
            "rows of a matrix",
            "lane / 16 * 4 + lane / 2 % 4",
            "lane / 16 * 4 + lane % 4",
        ),
        (
            "pairs of a matrix",
            "lane / 8 % 2 * 2 + lane % 2",
            "lane / 8 % 2 + lane % 2 * 2",
        ),
        ("codes past N", "if (n < shape.n && k < shape.k)", "if (k < shape.k)"),
        ("codes past N, by one", "if (n < shape.n &&", "if (n <= shape.n &&"),
        ("codes past K", "if (n < shape.n && k < shape.k)", "if (n < shape.n)"),
        ("codes past K, by one", "&& k < shape.k)", "&& k <= shape.k)"),
        (
            "tile's scale without its group",
            "shape.scales_row + k / GROUP_SIZE",
            "shape.scales_row",
        ),
        (
            "tile's scale of the next group",
            "shape.scales_row + k / GROUP_SIZE",
            "shape.scales_row + k / GROUP_SIZE + 1",
        ),
        (
            "tile's last group dropped",
            "&& k < shape.k)",
            "&& k + GROUP_SIZE < shape.k)",
        ),
        (
            "two weights swapped",
            "fma(low, codes.scale, codes.bias), fma(high,",
            "fma(high, codes.scale, codes.bias), fma(low,",
        ),
        ("elements of a matrix swapped", "[0] = two.x;", "[0] = two.y;"),
        (
            "an index of E taken",
            "expert >= shape.experts ?",
            "expert > shape.experts ?",
        ),
        ("negative indices taken", "expert < 0 || ", ""),
        ("rows of the expert before", "<= t ? 1 : 0", "< t ? 1 : 0"),
        ("32 experts only", "e < shape.experts; e += 32", "e < 32; e += 32"),
        (
            "rows past the end have an expert",
            "before == int(shape.experts) ? -1 : before",
            "min(before, int(shape.experts) - 1)",
        ),
        (
            "NaN for rows past the end",
            "expert == -1 ? X(0.0f)",
            "expert == -2 ? X(0.0f)",
        ),
        ("experts begin at row 0", "is_expert && e > 0 ?", "false ?"),
        ("ends past the rows", "min(long(ends[e]), shape.m)", "long(ends[e])"),
        (
            "last tile of an expert dropped",
            "(end - first + most - 1) / most",
            "(end - first) / most",
        ),
        (
            "tile of an expert before",
            "index < upto && index >= upto - count",
            "index < upto",
        ),
        ("tile past its expert", "int(min(from + most, end))", "int(from + most)"),
        (
            "tiles of 32 experts",
            "before = simd_shuffle(upto, ushort(31))",
            "before = 0",
        ),
        ("experts of the first 32", "int(base) + owner", "owner"),
    )
]
