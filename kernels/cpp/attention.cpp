// Causal attention within each of several captions that lie one behind the other, and its gradient, in float32.
//
// qkv [tokens, 3 * heads * dim]: a token's queries, keys and values, each by heads. A caption has some dozen tokens, so
// that its keys and values stay in the cache and nothing is worth keeping from the forward pass.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "each_cpu.h"

namespace {

constexpr int64_t LANES = 16;  // sums that a product of two vectors is kept in, for the compiler to use wide registers

EACH_CPU float dot(const float* RESTRICT a, const float* RESTRICT b, int64_t n) {
  float lanes[LANES] = {}, sum = 0;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t k = 0; k < LANES; k++) lanes[k] += a[i + k] * b[i + k];
  for (; i < n; i++) sum += a[i] * b[i];
  for (float lane : lanes) sum += lane;
  return sum;
}

EACH_CPU void add_scaled(const float* RESTRICT x, int64_t n, float factor, float* RESTRICT y) {
  for (int64_t i = 0; i < n; i++) y[i] += factor * x[i];
}

// One head of one caption: rows `stride` numbers apart.
struct Head {
  const float *query, *key, *value;
  int64_t stride, dim;
  float scale;

  // Writes what token i gives to each of the tokens 0 to i.
  void probabilities(int64_t i, float* p) const {
    for (int64_t j = 0; j <= i; j++) p[j] = scale * dot(query + i * stride, key + j * stride, dim);
    const float largest = *std::max_element(p, p + i + 1);
    float sum = 0;
    for (int64_t j = 0; j <= i; j++) sum += p[j] = std::exp(p[j] - largest);
    for (int64_t j = 0; j <= i; j++) p[j] /= sum;
  }
};

// Calls each(head, first token, tokens, the head's first column in the output, memory, memory) for every head of every
// caption; both memories have room for a number for each token of the longest one.
template <class Each>
void for_each_head(const float* qkv, const int32_t* starts, int64_t captions, int64_t heads, int64_t dim, int threads,
                   Each each) {
  const int64_t width = heads * dim, stride = 3 * width;
  int64_t longest = 0;
  for (int64_t k = 0; k < captions; k++) longest = std::max<int64_t>(longest, starts[k + 1] - starts[k]);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < captions; k++) {
    std::vector<float> p(2 * longest);
    for (int64_t h = 0; h < heads; h++) {
      const float* first = qkv + starts[k] * stride + h * dim;
      const Head head{first, first + width, first + 2 * width, stride, dim, 1 / std::sqrt(float(dim))};
      each(head, starts[k], starts[k + 1] - starts[k], h * dim, p.data(), p.data() + longest);
    }
  }
}

}  // namespace

extern "C" {

// out [tokens, heads * dim], which must be 0.
void fastbd_attention(const float* qkv, const int32_t* starts, int64_t captions, int64_t heads, int64_t dim,
                      int threads, float* out) {
  const int64_t width = heads * dim;
  for_each_head(qkv, starts, captions, heads, dim, threads,
                [&](const Head& head, int64_t start, int64_t tokens, int64_t column, float* p, float*) {
                  for (int64_t i = 0; i < tokens; i++) {
                    head.probabilities(i, p);
                    float* y = out + (start + i) * width + column;
                    for (int64_t j = 0; j <= i; j++) add_scaled(head.value + j * head.stride, dim, p[j], y);
                  }
                });
}

// of_qkv, as qkv, which must be 0; from the gradient of the output.
void fastbd_attention_backward(const float* gradient, const float* qkv, const int32_t* starts, int64_t captions,
                               int64_t heads, int64_t dim, int threads, float* of_qkv) {
  const int64_t width = heads * dim, stride = 3 * width;
  for_each_head(qkv, starts, captions, heads, dim, threads,
                [&](const Head& head, int64_t start, int64_t tokens, int64_t column, float* p, float* of_p) {
                  float *dq = of_qkv + start * stride + column, *dk = dq + width, *dv = dk + width;
                  for (int64_t i = 0; i < tokens; i++) {
                    const float* g = gradient + (start + i) * width + column;
                    head.probabilities(i, p);
                    float mean = 0;
                    for (int64_t j = 0; j <= i; j++) {
                      of_p[j] = dot(g, head.value + j * stride, dim);
                      mean += p[j] * of_p[j];
                    }
                    for (int64_t j = 0; j <= i; j++) {
                      const float of_score = p[j] * (of_p[j] - mean) * head.scale;
                      add_scaled(head.key + j * stride, dim, of_score, dq + i * stride);
                      add_scaled(head.query + i * stride, dim, of_score, dk + j * stride);
                      add_scaled(g, dim, p[j], dv + j * stride);
                    }
                  }
                });
}

}  // extern "C"
