// A packed matrix, the rows of x that belong to each expert, and memory that is kept.
#pragma once

#include <cstdlib>

#include "values.h"

// What a call returns.
enum { DONE, NOT_HERE, NO_EXPERT, NO_MEMORY };

struct Matrix {
  const uint8_t* words;
  i64 word_stride;  // bytes
  const void* scales;
  i64 scale_stride;  // elements
  const void* biases;
  i64 bias_stride;
  int part_type;  // of scales and biases
  i64 n, k;

  i64 groups() const { return k / GROUP; }
  const uint8_t* row(i64 n) const { return words + n * word_stride; }

  // The matrix of expert e, where this is the first one. Strides as a caller gives them.
  Matrix of_expert(i64 e, i64 expert_words, i64 expert_scales, i64 expert_biases) const {
    Matrix own = *this;
    own.words += e * expert_words * 4;
    own.scales = (const char*)scales + e * expert_scales * size_of(part_type);
    own.biases = (const char*)biases + e * expert_biases * size_of(part_type);
    return own;
  }
};

constexpr int PARTS_AHEAD = 1024;  // bytes of scales and biases, fetched before their turn

// Scales or biases of L groups from group g on; those past the last are zero.
INLINE F parts_at(const void* p, i64 row, i64 g, i64 groups, int type) {
  fetch((const char*)p + (row + g) * size_of(type) + PARTS_AHEAD);
  if (g + L <= groups) return load_values(p, row + g, type);
  float some[L] = {};
  for (i64 i = 0; g + i < groups; i++) some[i] = value_at(p, row + g + i, type);
  return load_f(some);
}

// Memory that grows and is used again; what was in it is gone at the next `get`.
struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  void* get(size_t bytes) {
    if (bytes > size) {
      free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = aligned_alloc(64, size);
      if (!data) size = 0;
    }
    return data;
  }
  ~Scratch() { free(data); }
};

// Rows of x by expert: those of expert e are from[e] to from[e + 1], named by `order` where
// there is one.
struct ByExpert {
  i64 *from, *order;
};

// `ends` [experts]: rows of expert e end there; rows of y [m, columns] past the last become
// zeros. `owners` [m]: the expert of each row. With neither, all rows are the first one's.
static int rows_by_expert(
    i64 m, i64 experts, const i64* ends, const i64* owners, void* y, i64 y_stride, i64 columns,
    int type, Scratch& room, ByExpert& rows) {
  i64* from = (i64*)room.get(sizeof(i64) * (2 * (experts + 1) + m));
  if (!from) return NO_MEMORY;
  i64 *at = from + experts + 1, *order = at + experts + 1;
  memset(from, 0, sizeof(i64) * (experts + 1));
  rows = {from, owners ? order : nullptr};
  if (owners) {
    for (i64 i = 0; i < m; i++) {
      if (owners[i] < 0 || owners[i] >= experts) return NO_EXPERT;
      from[owners[i] + 1]++;
    }
    for (i64 e = 0; e < experts; e++) from[e + 1] += from[e];
    memcpy(at, from, sizeof(i64) * (experts + 1));
    for (i64 i = 0; i < m; i++) order[at[owners[i]]++] = i;
  } else if (ends) {
    for (i64 e = 0; e < experts; e++) from[e + 1] = ends[e] > from[e] ? ends[e] < m ? ends[e] : m : from[e];
    for (i64 i = from[experts]; i < m; i++)
      memset((char*)y + i * y_stride * size_of(type), 0, columns * size_of(type));
  } else {
    from[1] = m;
  }
  return DONE;
}
