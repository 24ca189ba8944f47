// The products of a backward pass in bfloat16: out = a b and out = a^T b, summed in float32 and rounded once.
//
// Pairs of neighbours along the summed axis share a 32-bit lane, as the CPU's dot product wants them. A tile of 8 rows by
// 48 columns stays in registers: for each pair, three vectors of b and one broadcast of a per row. What is read with a
// stride is put in order first, panel by panel; that is a few percent of the work once some dozen rows share it.
//
// No kernel is generated for a new number of rows, which is what these products cost elsewhere.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#include <immintrin.h>
#define HF_MOE_PRODUCTS 1
#endif

namespace {

bool has_products() {
#if defined(HF_MOE_PRODUCTS)
  return true;
#else
  return false;
#endif
}

#if defined(HF_MOE_PRODUCTS)

constexpr int64_t kRows = 8;
constexpr int kVectors = 3;
constexpr int64_t kColumns = 16 * kVectors;

// 16 lanes at most: (upper << 16) | lower, the pair of two rows; absent rows and lanes are 0.
inline __m512i pair(const uint16_t* lower, const uint16_t* upper, __mmask16 lanes) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, lower));
  if (!upper) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, upper));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? (__mmask16)0xffff : count <= 0 ? (__mmask16)0 : (__mmask16)((1u << count) - 1);
}

// panel[p][48]: columns begin..begin+48 of the pairs of rows of b (rows, width).
void pack_panel(const uint16_t* b, int64_t rows, int64_t stride, int64_t begin, int64_t width, uint32_t* panel) {
  __mmask16 lanes[kVectors];
  for (int v = 0; v < kVectors; ++v) lanes[v] = first_lanes(width - begin - 16 * v);
  for (int64_t p = 0; 2 * p < rows; ++p) {
    const uint16_t* lower = b + 2 * p * stride + begin;
    const uint16_t* upper = 2 * p + 1 < rows ? lower + stride : nullptr;
    for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_si512(panel + p * kColumns + 16 * v, pair(lower + 16 * v, upper ? upper + 16 * v : nullptr, lanes[v]));
    }
  }
}

// out[r][0..columns] = sum over p of a[r * row + p * step] . panel[p][...] for ROWS rows
template <int ROWS>
void tile(const uint32_t* a, int64_t row, int64_t step, const uint32_t* panel, int64_t pairs, uint16_t* out,
          int64_t stride, int64_t columns) {
  __m512 acc[ROWS][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh b[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) b[v] = (__m512bh)_mm512_loadu_si512(panel + p * kColumns + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32((int)a[r * row + p * step]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, b[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      _mm256_mask_storeu_epi16(out + r * stride + 16 * v, first_lanes(columns - 16 * v),
                               (__m256i)_mm512_cvtneps_pbh(acc[r][v]));
    }
  }
}

void tile_of(int64_t rows, const uint32_t* a, int64_t row, int64_t step, const uint32_t* panel, int64_t pairs,
             uint16_t* out, int64_t stride, int64_t columns) {
  switch (rows) {
    case 1: return tile<1>(a, row, step, panel, pairs, out, stride, columns);
    case 2: return tile<2>(a, row, step, panel, pairs, out, stride, columns);
    case 3: return tile<3>(a, row, step, panel, pairs, out, stride, columns);
    case 4: return tile<4>(a, row, step, panel, pairs, out, stride, columns);
    case 5: return tile<5>(a, row, step, panel, pairs, out, stride, columns);
    case 6: return tile<6>(a, row, step, panel, pairs, out, stride, columns);
    case 7: return tile<7>(a, row, step, panel, pairs, out, stride, columns);
    default: return tile<8>(a, row, step, panel, pairs, out, stride, columns);
  }
}

void check(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  for (const at::Tensor* t : {&a, &b, &out}) {
    TORCH_CHECK(t->dim() == 2 && t->scalar_type() == at::kBFloat16, "matrices must be bfloat16");
    TORCH_CHECK(t->size(1) < 2 || t->stride(1) == 1, "rows must be contiguous");
  }
}

uint16_t* data(const at::Tensor& t) { return reinterpret_cast<uint16_t*>(t.data_ptr()); }

#endif  // HF_MOE_PRODUCTS

// a (M, K), b (K, N) -> out (M, N); K must be even, and so the distance of the rows of a
void product(const at::Tensor& a, const at::Tensor& b, at::Tensor out) {
#if defined(HF_MOE_PRODUCTS)
  check(a, b, out);
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  TORCH_CHECK(b.size(0) == k && out.size(0) == m && out.size(1) == n, "shapes do not match");
  TORCH_CHECK(k % 2 == 0 && (m < 2 || a.stride(0) % 2 == 0), "the summed axis must be even");
  const uint32_t* left = reinterpret_cast<const uint32_t*>(data(a));
  const int64_t row = a.stride(0) / 2, stride = out.stride(0), pairs = k / 2;
  const int64_t panels = (n + kColumns - 1) / kColumns;
  at::parallel_for(0, panels, 1, [&](int64_t from, int64_t to) {
    std::vector<uint32_t> panel(pairs * kColumns);
    for (int64_t i = from; i < to; ++i) {
      const int64_t begin = i * kColumns, columns = std::min(kColumns, n - begin);
      pack_panel(data(b), k, b.stride(0), begin, n, panel.data());
      for (int64_t r = 0; r < m; r += kRows) {
        tile_of(std::min(kRows, m - r), left + r * row, row, 1, panel.data(), pairs, data(out) + r * stride + begin,
                stride, columns);
      }
    }
  });
#else
  TORCH_CHECK(false, "this CPU has no bfloat16 dot product");
#endif
}

// a (R, M), b (R, N) -> out (M, N), summed over R
void transposed_product(const at::Tensor& a, const at::Tensor& b, at::Tensor out) {
#if defined(HF_MOE_PRODUCTS)
  check(a, b, out);
  const int64_t rows = a.size(0), m = a.size(1), n = b.size(1), pairs = (rows + 1) / 2;
  TORCH_CHECK(b.size(0) == rows && out.size(0) == m && out.size(1) == n, "shapes do not match");
  const int64_t panels = (n + kColumns - 1) / kColumns, tiles = (m + kRows - 1) / kRows;
  const int64_t stride = out.stride(0);
  std::vector<uint32_t> right(panels * pairs * kColumns);
  at::parallel_for(0, panels, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      pack_panel(data(b), rows, b.stride(0), i * kColumns, n, right.data() + i * pairs * kColumns);
    }
  });
  at::parallel_for(0, tiles, 1, [&](int64_t from, int64_t to) {
    std::vector<uint32_t> left(pairs * kRows);
    for (int64_t t = from; t < to; ++t) {
      const int64_t begin = t * kRows, count = std::min(kRows, m - begin);
      for (int64_t p = 0; p < pairs; ++p) {
        const uint16_t* lower = data(a) + 2 * p * a.stride(0) + begin;
        const uint16_t* upper = 2 * p + 1 < rows ? lower + a.stride(0) : nullptr;
        _mm512_mask_storeu_epi32(left.data() + p * kRows, 0xff, pair(lower, upper, first_lanes(count)));
      }
      for (int64_t i = 0; i < panels; ++i) {
        tile_of(count, left.data(), 1, kRows, right.data() + i * pairs * kColumns, pairs,
                data(out) + begin * stride + i * kColumns, stride, std::min(kColumns, n - i * kColumns));
      }
    }
  });
#else
  TORCH_CHECK(false, "this CPU has no bfloat16 dot product");
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hf_moe_compiled, m) {
  m.def("has_products() -> bool", has_products);
  m.def("product(Tensor a, Tensor b, Tensor(a!) out) -> ()");
  m.def("transposed_product(Tensor a, Tensor b, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(hf_moe_compiled, CPU, m) {
  m.impl("product", product);
  m.impl("transposed_product", transposed_product);
}
