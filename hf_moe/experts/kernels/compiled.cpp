// out[s] = W[e] x[s] + b[e] for the rows s of each chosen expert e.
//
// A few rows: time is the reading of W. Every block of four weight rows is read from memory once and multiplied with
// all rows of the expert while it is in the first-level cache, four rows at a time: 16 sums in registers, each over the
// contiguous last axis of both sides. Vectors are those of the compiler's vector extension; bfloat16 uses the CPU's own
// dot product where there is one.
//
// Some dozen rows: W is still read once and as it lies; tiles (see `compiled_tiles.h`) of eight of its rows by the
// transposed rows of x. Many rows: time is the arithmetic, and W is worth packing.

#include "compiled_tiles.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int kBlock = 4;
constexpr int64_t kPanel = 96;  // output features per task: a whole number of blocks and of tiles

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline VecF load(const at::BFloat16* p) {
  VecH h;
  std::memcpy(&h, p, sizeof(h));
  return (VecF)(__builtin_convertvector(h, VecU) << 16);
}

// Sums of 16 accumulators at once: result[i] = sum of a[i].
__attribute__((always_inline)) inline void reduce(const VecF* a, float* result) {
#if defined(__AVX512F__)
  __m512 b[8], c[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[2 * i], (__m512)a[2 * i + 1]),
                         _mm512_unpackhi_ps((__m512)a[2 * i], (__m512)a[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512d lo = _mm512_castps_pd(b[2 * i]), hi = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi)), _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi)));
  }
  __m512 d0 = _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
  __m512 d1 = _mm512_add_ps(_mm512_shuffle_f32x4(c[2], c[3], 0x88), _mm512_shuffle_f32x4(c[2], c[3], 0xdd));
  _mm512_storeu_ps(result, _mm512_add_ps(_mm512_shuffle_f32x4(d0, d1, 0x88), _mm512_shuffle_f32x4(d0, d1, 0xdd)));
#else
  for (int i = 0; i < kBlock * kBlock; ++i) {
    float sum = 0.f;
    for (int l = 0; l < kLanes; ++l) sum += a[i][l];
    result[i] = sum;
  }
#endif
}

// Eight rows of weights ahead, into the second-level cache: further away than the hardware looks by itself.
template <bool PREFETCH, typename T>
inline void prefetch(const T* w, int64_t k) {
  if constexpr (PREFETCH) __builtin_prefetch(w + 2 * kBlock * k, 0, 2);
}

// sums[r * 4 + o] = dot(x row r, w row o). The loops must be unrolled, or the sums live in memory.
template <int ROWS, bool PREFETCH, typename T>
inline void block(const T* x, const T* w, int64_t k, float* sums) {
  VecF acc[kBlock][kBlock] = {};
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    for (; i + 32 <= k; i += 32) {
      __m512bh xv[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) xv[r] = (__m512bh)_mm512_loadu_si512(x + r * k + i);
#pragma GCC unroll 4
      for (int o = 0; o < kBlock; ++o) {
        const __m512bh wv = (__m512bh)_mm512_loadu_si512(w + o * k + i);
        prefetch<PREFETCH>(w + o * k + i, k);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) acc[r][o] = (VecF)_mm512_dpbf16_ps((__m512)acc[r][o], xv[r], wv);
      }
    }
  }
#endif
  for (; i + kLanes <= k; i += kLanes) {
    VecF xv[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) xv[r] = load(x + r * k + i);
#pragma GCC unroll 4
    for (int o = 0; o < kBlock; ++o) {
      const VecF wv = load(w + o * k + i);
      prefetch<PREFETCH>(w + o * k + i, k);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) acc[r][o] += xv[r] * wv;
    }
  }
  reduce(&acc[0][0], sums);
  for (; i < k; ++i) {
    for (int r = 0; r < ROWS; ++r) {
      for (int o = 0; o < kBlock; ++o) sums[r * kBlock + o] += (float)x[r * k + i] * (float)w[o * k + i];
    }
  }
}

// Four sums of one row, with their biases, to where they belong.
inline void store(const float* sums, const float* bias, float* out) {
  for (int o = 0; o < kBlock; ++o) out[o] = sums[o] + (bias ? bias[o] : 0.f);
}

inline void store(const float* sums, const at::BFloat16* bias, at::BFloat16* out) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  __m128 v = _mm_loadu_ps(sums);
  if (bias) {
    v = _mm_add_ps(v, _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)bias)), 16)));
  }
  _mm_storel_epi64((__m128i*)out, (__m128i)_mm_cvtneps_pbh(v));
#else
  for (int o = 0; o < kBlock; ++o) out[o] = (at::BFloat16)(sums[o] + (bias ? (float)bias[o] : 0.f));
#endif
}

template <int ROWS, bool PREFETCH, typename T>
inline void finish(const T* x, const T* w, const T* bias, int64_t k, int64_t width, T* out) {
  float sums[kBlock * kBlock];
  block<ROWS, PREFETCH>(x, w, k, sums);
  for (int r = 0; r < ROWS; ++r) store(sums + r * kBlock, bias, out + r * width);
}

// Up to four rows.
template <bool PREFETCH, typename T>
inline void rows_of_block(int64_t rows, const T* x, const T* w, const T* bias, int64_t k, int64_t width, T* out) {
  switch (rows) {
    case 1: finish<1, PREFETCH>(x, w, bias, k, width, out); break;
    case 2: finish<2, PREFETCH>(x, w, bias, k, width, out); break;
    case 3: finish<3, PREFETCH>(x, w, bias, k, width, out); break;
    default: finish<4, PREFETCH>(x, w, bias, k, width, out);
  }
}

// The rows of one expert.
template <typename T>
struct Rows {
  const T *x, *w, *bias;
  int64_t rows, k, width;
  T* out;
};

// Features begin..end of a few rows.
template <typename T>
void dots(const Rows<T>& e, int64_t begin, int64_t end) {
  int64_t o = begin;
  for (; o + kBlock <= end; o += kBlock) {
    const T* w = e.w + o * e.k;
    const T* bias = e.bias ? e.bias + o : nullptr;
    rows_of_block<true>(e.rows, e.x, w, bias, e.k, e.width, e.out + o);  // the weights arrive with the first rows
    for (int64_t r = kBlock; r < e.rows; r += kBlock) {
      rows_of_block<false>(e.rows - r, e.x + r * e.k, w, bias, e.k, e.width, e.out + r * e.width + o);
    }
  }
  for (; o < end; ++o) {  // at most three features of the last panel
    for (int64_t r = 0; r < e.rows; ++r) {
      float sum = e.bias ? (float)e.bias[o] : 0.f;
      for (int64_t i = 0; i < e.k; ++i) sum += (float)e.x[r * e.k + i] * (float)e.w[o * e.k + i];
      e.out[r * e.width + o] = (T)sum;
    }
  }
}

#if defined(HF_MOE_TILES)

// From here on a vector of rows is faster than dots, even if it is not full.
template <typename T>
constexpr int64_t kSomeRows = std::is_same_v<T, float> ? 12 : 15;

constexpr int64_t kManyRows = kTileColumns;  // above, packed weights are faster than packed rows

// Rows of an expert that are taken as vectors; a few that are left over are dots.
template <typename T>
int64_t turned_rows(int64_t rows) {
  return rows % 16 < kSomeRows<T> ? rows / 16 * 16 : rows;
}

// As `dots`, with the transpose of the rows in `panel`.
template <typename T>
void turned(const Rows<T>& e, const uint32_t* panel, int64_t begin, int64_t end) {
  const int64_t lanes = e.k / kPerLane<T>, count = turned_rows<T>(e.rows);
  const int vectors = (int)((count + 15) / 16);
  const Rows<T> rest{e.x + count * e.k, e.w, e.bias, e.rows - count, e.k, e.width, e.out + count * e.width};
  alignas(64) float sums[kTileRows * kTileColumns], square[16 * 16];
  for (int64_t o = begin; o < end; o += kTileRows) {
    const int64_t tall = std::min(kTileRows, end - o), ahead = 2 * kTileRows;
    const int64_t fetched = std::clamp<int64_t>(e.width - o - ahead, 0, tall);
    const T* w = e.w + o * e.k;
    multiply_panel<T, float>(tall, reinterpret_cast<const uint32_t*>(w), lanes, 1, panel, vectors, lanes, nullptr, 0,
                             sums, kTileColumns, 16 * vectors,
                             {w + ahead * e.k, fetched * e.k * (int64_t)sizeof(T), 4 * kTileRows});
    const __mmask16 features = first_lanes(tall);
    const __m512 bias = e.bias ? load_floats(e.bias + o, features) : _mm512_setzero_ps();
    for (int64_t r = 0; r < count; ++r) {
      if (r % 16 == 0) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(sums) + r;
        turn(from, kTileColumns, tall, 16, reinterpret_cast<uint32_t*>(square), 16);
      }
      const __m512 sum = _mm512_load_ps(square + r % 16 * 16);
      store_floats(e.out + r * e.width + o, features, _mm512_add_ps(sum, bias));
    }
    if (rest.rows) dots(rest, o, o + tall);
  }
}

// As `dots`, for many rows.
template <typename T>
void tiles(const Rows<T>& e, uint32_t* packed, int64_t begin, int64_t end) {
  constexpr int64_t kPage = 4096;  // the hardware looks ahead within a page: longer rows need no help
  const int64_t lanes = e.k / kPerLane<T>, bytes = e.k * sizeof(T);
  int vectors;
  for (int64_t o = begin; o < end; o += 16 * vectors) {
    vectors = panel_vectors(end - o);
    const int64_t after = o + 16 * vectors, next = std::clamp<int64_t>(e.width - after, 0, kTileColumns);
    pack_rows(e.w + o * e.k, end - o, e.k, e.k, vectors, packed);
    multiply_panel<T>(e.rows, reinterpret_cast<const uint32_t*>(e.x), lanes, 1, packed, vectors, lanes,
                      e.bias ? e.bias + o : nullptr, 0, e.out + o, e.width, end - o,
                      {e.w + after * e.k, bytes < kPage ? next * bytes : 0});
  }
}

#endif  // HF_MOE_TILES

// By the way that suits the number of rows. `packed_for` is the expert whose rows this thread has packed.
template <typename T>
void features(const Rows<T>& e, int64_t expert, int64_t begin, int64_t end, [[maybe_unused]] int64_t& packed_for) {
#if defined(HF_MOE_TILES)
  if constexpr (has_tiles<T>()) {
    if (e.rows >= kSomeRows<T> && e.k % kPerLane<T> == 0) {
      uint32_t* packed = scratch<0>(e.k / kPerLane<T> * kTileColumns);
      if (e.rows > kManyRows) {
        packed_for = -1;
        return tiles(e, packed, begin, end);
      }
      if (packed_for != expert) {
        const int64_t count = turned_rows<T>(e.rows);
        pack_rows(e.x, count, e.k, e.k, (int)((count + 15) / 16), packed);
        packed_for = expert;
      }
      return turned(e, packed, begin, end);
    }
  }
#endif
  dots(e, begin, end);
}

// rows (S, I) sorted by expert, weight (N, O, I), experts and ends of the chosen ones -> out (S, O)
void grouped_rows(const at::Tensor& rows, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  at::IntArrayRef experts, at::IntArrayRef ends, at::Tensor out) {
  const int64_t k = rows.size(1), width = weight.size(1), chosen = experts.size();
  TORCH_CHECK(rows.is_contiguous() && weight.is_contiguous() && out.is_contiguous(), "tensors must be contiguous");
  TORCH_CHECK(!bias || bias->is_contiguous(), "`bias` must be contiguous");
  TORCH_CHECK(weight.size(2) == k && out.size(0) == rows.size(0) && out.size(1) == width, "shapes do not match");
  TORCH_CHECK(rows.scalar_type() == weight.scalar_type() && out.scalar_type() == weight.scalar_type() &&
                  (!bias || bias->scalar_type() == weight.scalar_type()), "dtypes do not match");
  TORCH_CHECK(experts.size() == ends.size(), "`experts` and `ends` must be of one length");
  for (int64_t i = 0, start = 0; i < chosen; start = ends[i], ++i) {
    TORCH_CHECK(experts[i] >= 0 && experts[i] < weight.size(0) && ends[i] >= start && ends[i] <= rows.size(0),
                "expert or row out of range");
  }
  const int64_t panels = (width + kPanel - 1) / kPanel;
  auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = rows.const_data_ptr<T>();
    const T* w = weight.const_data_ptr<T>();
    const T* b = bias ? bias->const_data_ptr<T>() : nullptr;
    T* y = out.mutable_data_ptr<T>();
    at::parallel_for(0, chosen * panels, 1, [&](int64_t from, int64_t to) {
      int64_t packed_for = -1;
      for (int64_t task = from; task < to; ++task) {
        const int64_t i = task / panels, begin = (task % panels) * kPanel, start = i ? ends[i - 1] : 0;
        const Rows<T> e{x + start * k, w + experts[i] * width * k, b ? b + experts[i] * width : nullptr,
                        ends[i] - start, k, width, y + start * width};
        features<T>(e, i, begin, std::min(begin + kPanel, width), packed_for);
      }
    });
  };
  if (weight.scalar_type() == at::kFloat) {
    run((float*)nullptr);
  } else {
    TORCH_CHECK(weight.scalar_type() == at::kBFloat16, "dtype must be float32 or bfloat16");
    run((at::BFloat16*)nullptr);
  }
}

}  // namespace

TORCH_LIBRARY(hf_moe_compiled, m) {
  m.def("grouped_rows(Tensor rows, Tensor weight, Tensor? bias, int[] experts, int[] ends, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(hf_moe_compiled, CPU, m) { m.impl("grouped_rows", grouped_rows); }
