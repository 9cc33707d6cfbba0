// How codes come out of words: as bytes, or as 16-bit floats, in registers of a lane.
//
// A row of codes is one little-endian stream of bits. The order in which codes come out is
// the one that costs least; inputs are put into the same order.

#pragma once

#include "machine.cuh"

// ---- bytes ----------------------------------------------------------------------
//
// 32 consecutive codes (WIDTH words) become 8 registers of four bytes, "quads". Quad q
// holds the codes first(q) + offset(i), i = 0..3. Quads 0 to 3 are of the first 16 codes if
// APART says so, and for most widths anyway.

template <int WIDTH, bool APART>
struct Quads {
  // Codes that lie WIDTH bytes apart: 8 of them, for 6 bits 4, begin anew at a byte.
  static constexpr bool THIRDS = WIDTH == 6;
  static constexpr bool EIGHTHS = WIDTH == 1 || WIDTH == 3 || WIDTH == 5;

  static DEVICE int first(int q) {
    if constexpr (WIDTH == 8) return 4 * q;
    else if constexpr (WIDTH == 4) return 8 * (q >> 1) + (q & 1);
    else if constexpr (!EIGHTHS) return 16 * (q >> 2) + (q & 3);
    else if constexpr (APART) return 16 * (q >> 2) + 2 * (q & 3);
    else return q;
  }

  static DEVICE int offset(int i) {
    if constexpr (WIDTH == 8) return i;
    else if constexpr (WIDTH == 4) return 2 * i;
    else if constexpr (!EIGHTHS) return 4 * i;
    else if constexpr (APART) return (i & 1) * 8 + (i >> 1);
    else return 8 * i;
  }

  static DEVICE void take(const u32* words, u32* quads) {
    if constexpr (WIDTH == 8) {
#pragma unroll
      for (int q = 0; q < 8; ++q) quads[q] = words[q];
    } else if constexpr (WIDTH == 4) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        quads[2 * w] = words[w] & 0x0f0f0f0fu;
        quads[2 * w + 1] = words[w] >> 4 & 0x0f0f0f0fu;
      }
    } else if constexpr (WIDTH == 2) {
#pragma unroll
      for (int q = 0; q < 8; ++q) quads[q] = words[q >> 2] >> 2 * (q & 3) & 0x03030303u;
    } else if constexpr (WIDTH == 1) {
#pragma unroll
      for (int q = 0; q < 8; ++q) quads[q] = words[0] >> q & 0x01010101u;
    } else if constexpr (THIRDS) {
      take_stream<3, 4>(words, quads);
      take_stream<3, 4>(words + 3, quads + 4);
    } else {
      take_stream<WIDTH, 8>(words, quads);
    }
    if constexpr (EIGHTHS && APART) {
#pragma unroll
      for (int i = 0; i < 4; ++i) set_apart(quads, i);
      const u32 second = quads[1], third = quads[2], fourth = quads[3];
      const u32 fifth = quads[4], sixth = quads[5], seventh = quads[6];
      quads[1] = third, quads[2] = fifth, quads[3] = seventh;
      quads[4] = second, quads[5] = fourth, quads[6] = sixth;
    }
  }

 private:
  // Quads 2i and 2i + 1 become codes of the first and of the second 16.
  static DEVICE void set_apart(u32* quads, int i) {
    const u32 even = quads[2 * i], odd = quads[2 * i + 1];
    quads[2 * i] = select_bytes(even, odd, 0x5410);
    quads[2 * i + 1] = select_bytes(even, odd, 0x7632);
  }

  static DEVICE constexpr u32 every(u32 byte) { return byte * 0x01010101u; }

  // Where byte i of four that lie `step` apart is to be found.
  static DEVICE constexpr int word(int first, int step, int i) { return (first + i * step) / 4; }

  // Bytes before `have` are there, in their places or still in those of the first word;
  // those of one more word join them.
  static DEVICE constexpr u32 joining(int first, int step, int have, bool placed) {
    u32 selector = 0;
    for (int i = 0; i < 4; ++i) {
      const u32 byte = (first + i * step) % 4;
      const bool joins = word(first, step, i) == word(first, step, have);
      const u32 from = i < have ? (placed ? i : byte) : joins ? 4 + byte : 0;
      selector |= from << 4 * i;
    }
    return selector;
  }

  static DEVICE constexpr int after(int first, int step, int i) {
    int next = i;
    while (next < 4 && word(first, step, next) == word(first, step, i)) ++next;
    return next;
  }

  // Four bytes STEP apart, the first one at FIRST.
  template <int FIRST, int STEP, int HAVE = 0>
  static DEVICE u32 gather(const u32* words, u32 out = 0) {
    constexpr int have = HAVE ? HAVE : after(FIRST, STEP, 0);
    if constexpr (have < 4) {
      constexpr u32 selector = joining(FIRST, STEP, have, HAVE > 0);
      const u32 before = HAVE ? out : words[word(FIRST, STEP, 0)];
      out = select_bytes(before, words[word(FIRST, STEP, have)], selector);
      return gather<FIRST, STEP, after(FIRST, STEP, have)>(words, out);
    }
    return out;
  }

  template <int STEP, int I = 0>
  static DEVICE void gather_all(const u32* words, u32* lanes) {
    if constexpr (I < STEP) {
      lanes[I] = gather<I, STEP>(words);
      gather_all<STEP, I + 1>(words, lanes);
    }
  }

  // COUNT quads whose bytes are WIDTH wide parts of streams of STEP bytes.
  template <int STEP, int COUNT>
  static DEVICE void take_stream(const u32* words, u32* quads) {
    u32 lanes[STEP];
    gather_all<STEP>(words, lanes);
#pragma unroll
    for (int q = 0; q < COUNT; ++q) {
      const int byte = q * WIDTH >> 3, shift = q * WIDTH & 7;
      if (shift + WIDTH <= 8) {
        quads[q] = lanes[byte] >> shift & every((1u << WIDTH) - 1);
      } else {
        const u32 low = (1u << (8 - shift)) - 1, all = (1u << WIDTH) - 1;
        const u32 high = lanes[byte + 1] << (8 - shift) & every(all & ~low);
        quads[q] = and_or(lanes[byte] >> shift, every(low), high);
      }
    }
  }
};

// ---- 16-bit floats --------------------------------------------------------------
//
// 16 consecutive codes become 8 registers of two floats OFFSET + code. In bfloat16, OFFSET
// is 128, in float16 1024, or what the codes themselves come to with all bits set plus
// one, if CLOSE: then sums of them lose less. 8 bits in bfloat16 have no offset.
// Registers hold the codes (i, i + 8), for 4 bits (i, i + 4) of each 8 and for 8 bits
// (i, i + 2) of each 4. `order` puts 16 inputs into the same order.

template <int WIDTH, int TYPE, bool CLOSE>
struct Pairs {
  static constexpr bool HALF = TYPE == FLOAT16;
  static constexpr bool PLAIN = WIDTH == 8 && !HALF;  // no offset
  static constexpr int PLACE = HALF && CLOSE ? 10 - WIDTH : 0;
  static constexpr float OFFSET = PLAIN ? 0.0f : !HALF ? 128.0f : CLOSE ? 1 << WIDTH : 1024.0f;
  static constexpr u32 MAGIC =
      (HALF ? (CLOSE ? (u32)(15 + WIDTH) << 10 : 0x6400u) : 0x4300u) * 0x10001u;
  static constexpr u32 MASK = (((1u << WIDTH) - 1) << PLACE) * 0x10001u;

  // Words that hold the 16 codes of lane t of four, and where in them they begin.
  static constexpr int WORDS = (WIDTH + 1) / 2;

  // From words of 64 codes.
  static DEVICE void load(const u32* from, int t, u32* words) {
    if constexpr (WIDTH == 4) {
      const uint2 two = *(const uint2*)(from + 2 * t);
      words[0] = two.x, words[1] = two.y;
    } else if constexpr (WIDTH == 8) {
      const uint4 four = *(const uint4*)(from + 4 * t);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
      const u32* at = from + (t * WIDTH >> 1);
#pragma unroll
      for (int i = 0; i < WORDS; ++i) words[i] = at[i];
    }
  }

  static DEVICE void take(const u32* words, int t, u32 magic, u32* pairs) {
    if constexpr (WIDTH == 4) {
#pragma unroll
      for (int w = 0; w < 2; ++w)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          pairs[4 * w + i] = and_or(moved(words[w], 4 * i - PLACE), MASK, magic);
    } else if constexpr (PLAIN) {
#pragma unroll
      for (int i = 0; i < 8; ++i) pairs[i] = plain(words[i >> 1] >> 8 * (i & 1), magic);
    } else if constexpr (WIDTH == 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        pairs[i] = and_or(moved(words[i >> 1], 8 * (i & 1) - PLACE), MASK, magic);
    } else if constexpr (WIDTH == 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) pairs[i] = and_or(moved(words[0], 2 * i - PLACE), MASK, magic);
    } else {
      u32 own[WORDS + 1];
      bring_down(words, t, own);
      take_windows<0>(own, magic, pairs);
    }
  }

  // Which of the 16 codes is in the low or the high half of a register.
  static DEVICE int place(int i, int high) {
    if constexpr (WIDTH == 4) return 8 * (i >> 2) + (i & 3) + 4 * high;
    else if constexpr (WIDTH == 8) return 4 * (i >> 1) + (i & 1) + 2 * high;
    else return i + 8 * high;
  }

  static DEVICE void order(const u32* x, u32* ordered) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int low = place(i, 0), high = place(i, 1);  // inputs
      ordered[i] = select_bytes(x[low >> 1], x[high >> 1], low & 1 ? 0x7632 : 0x5410);
    }
  }

 private:
  static DEVICE u32 moved(u32 word, int right) {
    return right >= 0 ? word >> right : word << -right;
  }

  // Seven bits of a byte fit beside the 128; the eighth is added as 128 of its own.
  static DEVICE u32 plain(u32 word, u32 magic) {
    const u32 rest = and_or(word, 0x007f007fu, magic);
    const u32 high = and_or(word, 0x00800080u, magic);  // 128, or 256
    const u32 one = 0x3f803f80u;
    return fma_bfloats(fma_bfloats(high, one, 0xc380c380u), one, rest);
  }

  // A lane of an odd width begins in the middle of a word if its number is odd.
  static DEVICE void bring_down(const u32* words, int t, u32* own) {
    const u32 shift = WIDTH % 2 == 0 ? 0 : (t & 1) * 16;
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
      own[i] = WIDTH % 2 == 0 ? words[i] : funnel(words[i], i + 1 < WORDS ? words[i + 1] : 0, shift);
    own[WORDS] = 0;
  }

  // The 16 bits that begin at bit BIT, in the low half; what is in the high half is noise.
  template <int BIT>
  static DEVICE u32 window(const u32* own) {
    constexpr int word = BIT >> 5, shift = BIT & 31;
    if constexpr (shift == 0) return own[word];
    else if constexpr (shift <= 16) return own[word] >> shift;
    else return funnel(own[word], own[word + 1], shift);
  }

  // Codes from I on, as many as 16 bits have room for, beside those 8 places on.
  template <int I>
  static DEVICE void take_windows(const u32* own, u32 magic, u32* pairs) {
    if constexpr (I < 8) {
      constexpr int COUNT = 16 / WIDTH < 8 - I ? 16 / WIDTH : 8 - I;
      const u32 both =
          select_bytes(window<I * WIDTH>(own), window<(I + 8) * WIDTH>(own), 0x5410);
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        pairs[I + i] = and_or(moved(both, i * WIDTH - PLACE), MASK, magic);
      take_windows<I + COUNT>(own, magic, pairs);
    }
  }
};
