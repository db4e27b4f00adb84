// How rows are read and written.
//
// Rows of T in memory are read into vectors of Acc<T> (float; double for double). Buffers of the statistics' type are
// padded with zeros to a multiple of Storage<T>::chunk, so only the caller's rows need care at their end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <ATen/cpu/vec/functional.h>

// A small function called several times would otherwise not be inlined, and its vectors would go through memory.
#define ATTNRES_INLINE __attribute__((always_inline))

namespace attnres {

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Two vectors of the statistics' type at a time: what one vector of a two-byte type widens to. For bfloat16 these are the
// even and the odd elements, which a shift and a mask give without moving anything between lanes; buffers of the
// statistics' type are kept in that order too (arrange, restore).
template <typename T>
struct Storage {
  using Vec = at::vec::Vectorized<Acc<T>>;
  static constexpr int64_t width = Vec::size();
  static constexpr int64_t chunk = 2 * width;
  static constexpr bool wide = std::is_same_v<T, Acc<T>>;
  static constexpr bool alternating = std::is_same_v<T, at::BFloat16>;

  static inline void load(const T* from, Vec& low, Vec& high) {
    if constexpr (wide) {
      low = Vec::loadu(from);
      high = Vec::loadu(from + width);
    } else if constexpr (alternating) {
      using Bits = at::vec::Vectorized<int32_t>;
      const Bits bits = Bits::loadu(from);
      low = at::vec::cast<float>(bits << Bits(16));
      high = at::vec::cast<float>(bits & Bits(static_cast<int32_t>(0xffff0000)));
    } else {
      std::tie(low, high) = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
    }
  }

  // Stream: past the caches, to an address that is a multiple of a vector's size.
  template <bool Stream = false>
  static inline void store(T* to, const Vec& low, const Vec& high) {
    if constexpr (wide) {
      put<Stream>(to, low);
      put<Stream>(to + width, high);
    } else if constexpr (alternating) {
      put<Stream>(to, rounded(low, high));
    } else {
      put<Stream>(to, at::vec::convert_from_float<T>(low, high));
    }
  }

  // The same for the `count` elements left at the end of a row; what is missing reads as zero.
  static inline void load(const T* from, int64_t count, Vec& low, Vec& high) {
    alignas(64) T padded[chunk] = {};
    std::memcpy(static_cast<void*>(padded), from, count * sizeof(T));
    load(padded, low, high);
  }

  static inline void store(T* to, int64_t count, const Vec& low, const Vec& high) {
    alignas(64) T padded[chunk];
    store(padded, low, high);
    std::memcpy(static_cast<void*>(to), padded, count * sizeof(T));
  }

 private:
  static inline at::vec::Vectorized<T> rounded(const Vec& even, const Vec& odd) {
#if defined(__AVX512BF16__)
    // One instruction rounds both, and leaves the odd elements behind the even ones.
    alignas(64) static constexpr int16_t order[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
#else
    const auto [first, second] = at::vec::interleave2(even, odd);
    return at::vec::convert_from_float<T>(first, second);
#endif
  }

  template <bool Stream, typename Any>
  static inline void put(T* to, const Any& vec) {
    if constexpr (Stream) {
#if defined(__AVX512F__)
      __m512i raw;
      static_assert(sizeof(raw) == sizeof(vec));
      std::memcpy(&raw, &vec, sizeof(raw));
      return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), raw);
#elif defined(__AVX2__)
      __m256i raw;
      static_assert(sizeof(raw) == sizeof(vec));
      std::memcpy(&raw, &vec, sizeof(raw));
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), raw);
#endif
    }
    vec.store(to);
  }
};

// A padded row from the order of its elements into that of load, and back.
template <typename T>
inline void arrange(Acc<T>* row, int64_t padded) {
  using S = Storage<T>;
  if constexpr (S::alternating) {
    for (int64_t column = 0; column < padded; column += S::chunk) {
      const auto [even, odd] =
          at::vec::deinterleave2(S::Vec::loadu(row + column), S::Vec::loadu(row + column + S::width));
      even.store(row + column);
      odd.store(row + column + S::width);
    }
  }
}

template <typename T>
inline void restore(Acc<T>* row, int64_t padded) {
  using S = Storage<T>;
  if constexpr (S::alternating) {
    for (int64_t column = 0; column < padded; column += S::chunk) {
      const auto [first, second] =
          at::vec::interleave2(S::Vec::loadu(row + column), S::Vec::loadu(row + column + S::width));
      first.store(row + column);
      second.store(row + column + S::width);
    }
  }
}

template <typename T>
constexpr int64_t padded_width(int64_t width) {
  return (width + Storage<T>::chunk - 1) / Storage<T>::chunk * Storage<T>::chunk;
}

} // namespace attnres
