// What memory allows: loops that read and write the bytes of a mix, and compute next to nothing.
#include <cstdint>

extern "C" void forward(const uint64_t* const* sources, int64_t count, uint64_t* out, int64_t rows, int64_t words) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    uint64_t* to = out + row * words;
    const uint64_t* first = sources[0] + row * words;
    for (int64_t j = 0; j < words; ++j) {
      to[j] = first[j];
    }
    for (int64_t i = 1; i < count; ++i) {
      const uint64_t* from = sources[i] + row * words;
      for (int64_t j = 0; j < words; ++j) {
        to[j] ^= from[j];
      }
    }
  }
}

// Reads every source row and the gradient row, writes one row a source.
extern "C" void backward(const uint64_t* const* sources, const uint64_t* grad, int64_t count, uint64_t* const* outs,
                         int64_t rows, int64_t words) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const uint64_t* pull = grad + row * words;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t* from = sources[i] + row * words;
      uint64_t* to = outs[i] + row * words;
      for (int64_t j = 0; j < words; ++j) {
        to[j] = from[j] ^ pull[j];
      }
    }
  }
}
