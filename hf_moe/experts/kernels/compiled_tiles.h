// A product of matrices in register tiles, without a kernel generated for each number of rows: out = a b.
//
// The summed axis is cut into 32-bit lanes: a number of float32, or two neighbours of bfloat16, as the CPU's dot
// product wants them. A tile of at most 8 rows by 48 columns stays in registers: for each lane, three vectors of a
// packed panel of b and one broadcast of a per row. Packing is a few percent of the work once some dozen rows share it.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define HF_MOE_TILES 1
#endif

namespace {

// Whether this CPU multiplies tiles of T.
template <typename T>
constexpr bool has_tiles() {
#if defined(HF_MOE_TILES) && defined(__AVX512BF16__)
  return std::is_same_v<T, float> || std::is_same_v<T, at::BFloat16>;
#elif defined(HF_MOE_TILES)
  return std::is_same_v<T, float>;
#else
  return false;
#endif
}

// Calls `run` with a null pointer of the dtype's type, if this CPU has tiles of it.
template <typename Run>
void for_tiled(at::ScalarType dtype, Run run) {
  if constexpr (has_tiles<float>()) {
    if (dtype == at::kFloat) return run((float*)nullptr);
  }
  if constexpr (has_tiles<at::BFloat16>()) {
    if (dtype == at::kBFloat16) return run((at::BFloat16*)nullptr);
  }
  TORCH_CHECK(false, "this CPU has no product of ", dtype, " here");
}

// Memory of one thread, kept from call to call; another SLOT is another piece. The content is whatever was there.
template <int SLOT>
uint32_t* scratch(int64_t lanes) {
  static thread_local std::vector<uint32_t> memory;
  if ((int64_t)memory.size() < lanes) memory.resize(lanes);
  return memory.data();
}

#if defined(HF_MOE_TILES)

constexpr int64_t kTileRows = 8;
constexpr int kTileVectors = 3;
constexpr int64_t kTileColumns = 16 * kTileVectors;

template <typename T>
constexpr int64_t kPerLane = 4 / sizeof(T);

template <typename T>
constexpr int64_t lanes_of(int64_t length) {
  return (length + kPerLane<T> - 1) / kPerLane<T>;
}

// Parts of equal length, none above `most`.
inline int64_t even_part(int64_t length, int64_t most) {
  if (length <= most) return std::max<int64_t>(1, length);
  const int64_t parts = (length + most - 1) / most;
  return (length + parts - 1) / parts;
}

// Vectors of the panel that begins `left` columns before the end; 2 + 2 instead of 3 + 1.
inline int panel_vectors(int64_t left) {
  const int64_t vectors = (left + 15) / 16;
  return vectors == 4 ? 2 : (int)std::min<int64_t>(vectors, kTileVectors);
}

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? (__mmask16)0xffff : count <= 0 ? (__mmask16)0 : (__mmask16)((1u << count) - 1);
}

inline __m512 load_floats(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }

inline __m512 load_floats(const at::BFloat16* p, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}

inline void store_floats(float* p, __mmask16 lanes, __m512 v) { _mm512_mask_storeu_ps(p, lanes, v); }

inline __m512 multiply_add(const float*, __m512i a, __m512i b, __m512 sum) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

#if defined(__AVX512BF16__)
inline void store_floats(at::BFloat16* p, __mmask16 lanes, __m512 v) {
  _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(v));
}

inline __m512 multiply_add(const at::BFloat16*, __m512i a, __m512i b, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

// 16 lanes of the summed axis' p-th step: a row, or the pair (upper << 16) | lower; what is absent is 0.
inline __m512i lanes_of_rows(const float* b, int64_t p, int64_t, int64_t stride, __mmask16 lanes) {
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes, b + p * stride));
}

inline __m512i lanes_of_rows(const at::BFloat16* b, int64_t p, int64_t rows, int64_t stride, __mmask16 lanes) {
  const at::BFloat16* lower = b + 2 * p * stride;
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, lower));
  if (2 * p + 1 >= rows) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, lower + stride));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Columns [0, columns) of b (rows, ...) summed over rows -> panels, one after the other, each (lanes, 16 * vectors).
// Reads a few rows ahead: they lie too far apart for the hardware to do so.
template <typename T>
void pack_columns(const T* b, int64_t rows, int64_t stride, int64_t columns, uint32_t* panels) {
  constexpr int64_t kAhead = 16;
  const int64_t lanes = lanes_of<T>(rows);
  for (int64_t p = 0; p < lanes; ++p) {
    int vectors;
    for (int64_t j = 0; j < columns; j += 16 * vectors) {
      vectors = panel_vectors(columns - j);
      uint32_t* to = panels + j * lanes + p * 16 * vectors;
      for (int v = 0; v < vectors; ++v) {
        const T* from = b + j + 16 * v;
        __builtin_prefetch(from + (p + kAhead) * kPerLane<T> * stride, 0, 2);
        _mm512_storeu_si512(to + 16 * v, lanes_of_rows(from, p, rows, stride, first_lanes(columns - j - 16 * v)));
      }
    }
  }
}

// A square of 16 x 16 lanes, turned: `rows` rows of w, of which `lanes` lanes exist -> to[lane][row].
inline void turn(const uint32_t* w, int64_t stride, int64_t rows, int64_t lanes, uint32_t* to, int64_t width) {
  const __mmask16 mask = first_lanes(lanes);
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    r[i] = i < rows ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(mask, w + i * stride)) : _mm512_setzero_ps();
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + j]: rows i..i+3 of the lanes j, 4 + j, 8 + j, 12 + j
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512d upper = _mm512_castps_pd(t[i + half]), lower = _mm512_castps_pd(t[i + 2 + half]);
      r[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(upper, lower));
      r[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(upper, lower));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const __m512 more = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 last = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(even, more, 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(odd, last, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(even, more, 0xdd);
    t[12 + j] = _mm512_shuffle_f32x4(odd, last, 0xdd);
  }
  if (lanes >= 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * width, t[i]);
  } else {
    for (int i = 0; i < lanes; ++i) _mm512_storeu_ps(to + i * width, t[i]);
  }
}

// The transpose of `rows` rows of b (..., length), a whole number of lanes long -> one panel (lanes, 16 * vectors).
template <typename T>
void pack_rows(const T* b, int64_t rows, int64_t length, int64_t stride, int vectors, uint32_t* panel) {
  const uint32_t* from = reinterpret_cast<const uint32_t*>(b);
  const int64_t lanes = length / kPerLane<T>, step = stride / kPerLane<T>;
  for (int v = 0; v < vectors; ++v) {
    for (int64_t p = 0; p < lanes; p += 16) {
      turn(from + 16 * v * step + p, step, rows - 16 * v, lanes - p, panel + p * 16 * vectors + 16 * v, 16 * vectors);
    }
  }
}

// out[r][...] = sum over p of a[r * row + p * step] . panel[p][...], + added[r * added_row][...] if that is given.
// Meanwhile memory is fetched from `next` on, `next_step` bytes per lane: what is packed next arrives while the CPU
// multiplies.
template <typename T, int ROWS, int VECTORS, typename Out>
void tile(const uint32_t* a, int64_t row, int64_t step, const uint32_t* panel, int64_t lanes, const Out* added,
          int64_t added_row, Out* out, int64_t stride, int64_t columns, const char* next, int64_t next_step) {
  const uint32_t* x[3] = {a, a + 3 * row, a + 6 * row};  // three bases instead of eight: they stay in registers
  __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < lanes; ++p) {
    __m512i b[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) b[v] = _mm512_loadu_si512(panel + v * 16);
    __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512i y = _mm512_set1_epi32((int)x[r / 3][r % 3 * row]);
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = multiply_add((const T*)nullptr, y, b[v], sum[r][v]);
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) x[i] += step;
    panel += VECTORS * 16;
    next += next_step;
  }
  const __mmask16 last = first_lanes(columns - 16 * (VECTORS - 1));
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r, out += stride) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) {
      const __mmask16 mask = v + 1 < VECTORS ? (__mmask16)0xffff : last;
      if (added) sum[r][v] = _mm512_add_ps(sum[r][v], load_floats(added + 16 * v, mask));
      store_floats(out + 16 * v, mask, sum[r][v]);
    }
    if (added) added += added_row;
  }
}

template <typename T, int VECTORS, typename... Args>
void tile_of_rows(int64_t rows, Args... args) {
  switch (rows) {
    case 1: return tile<T, 1, VECTORS>(args...);
    case 2: return tile<T, 2, VECTORS>(args...);
    case 3: return tile<T, 3, VECTORS>(args...);
    case 4: return tile<T, 4, VECTORS>(args...);
    case 5: return tile<T, 5, VECTORS>(args...);
    case 6: return tile<T, 6, VECTORS>(args...);
    case 7: return tile<T, 7, VECTORS>(args...);
    default: return tile<T, 8, VECTORS>(args...);
  }
}

// Lanes that are summed in registers before the sum goes to memory. A long chain of float32 sums loses digits; those of
// bfloat16 are below its own.
template <typename T>
constexpr int64_t kChain = std::is_same_v<T, float> ? 128 : INT64_MAX;

// What to fetch from memory meanwhile: so many bytes from here on, a few per lane.
struct Ahead {
  const void* from = nullptr;
  int64_t bytes = 0;
  int64_t per_lane = 64;
};

// All rows of a times one panel, in tiles of nearly equal height; see `tile`.
template <typename T, typename Out>
void multiply_panel(int64_t rows, const uint32_t* a, int64_t row, int64_t step, const uint32_t* panel, int vectors,
                    int64_t lanes, const Out* added, int64_t added_row, Out* out, int64_t stride, int64_t columns,
                    Ahead ahead = {}) {
  const int64_t height = even_part(rows, kTileRows), chain = even_part(lanes, kChain<T>);
  const char* next = static_cast<const char*>(ahead.from);
  for (int64_t r = 0; r < rows; r += height, ahead.bytes -= lanes * ahead.per_lane) {
    const int64_t count = std::min(height, rows - r);
    Out* y = out + r * stride;
    const Out* plus = added ? added + r * added_row : nullptr;
    int64_t plus_row = added_row, p = 0;
    do {
      const uint32_t *x = a + r * row + p * step, *b = panel + p * 16 * vectors;
      const int64_t depth = std::min(chain, lanes - p), fetch = ahead.bytes > 0 ? ahead.per_lane : 0;
      const char* from = fetch ? next : reinterpret_cast<const char*>(b);
      const auto run = [&](auto of_rows) {
        of_rows(count, x, row, step, b, depth, plus, plus_row, y, stride, columns, from, fetch);
      };
      switch (vectors) {
        case 1: run([](auto... args) { tile_of_rows<T, 1>(args...); }); break;
        case 2: run([](auto... args) { tile_of_rows<T, 2>(args...); }); break;
        default: run([](auto... args) { tile_of_rows<T, 3>(args...); });
      }
      next += depth * ahead.per_lane;
      plus = y;
      plus_row = stride;
      p += chain;
    } while (p < lanes);
  }
}

#endif  // HF_MOE_TILES

}  // namespace
