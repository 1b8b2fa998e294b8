// Batch norm in training with what follows it, pool(relu(norm(x) + shortcut)), and its gradients, in float32.
//
// A batch with its channels last is a matrix: a row for each pixel, a column for each channel. Memory limits the speed
// of all this, so nothing is written that can be computed again: where no shortcut is added, the sign that decides on
// a ReLU's gradient comes from x, and what goes into a pool is never stored.
//
// Chunks have a fixed size and their sums are added in order, so that no result depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "each_cpu.h"

namespace {

using Line = std::vector<float>;

constexpr int64_t WIDE = 512;       // numbers of a line, as long as that makes whole rows
constexpr int64_t CHUNK = 1 << 14;  // numbers of a chunk, as long as there are few enough chunks
constexpr int64_t MOST = 64;        // chunks
constexpr int64_t EXACT = 16;       // lines that are summed in float32; sums of sums are float64

// A batch in chunks of lines, and lines of whole rows. The last line may be shorter.
struct Lines {
  int64_t channels, count, width, chunk, chunks;

  Lines(int64_t rows, int64_t channels, int64_t width) : channels(channels), count(rows * channels), width(width) {
    int64_t lines = (count + width - 1) / width;
    chunk = width * std::max({int64_t(1), CHUNK / width, (lines + MOST - 1) / MOST});
    chunks = (count + chunk - 1) / chunk;
  }

  // The numbers of the channels, again and again.
  Line widened(const std::vector<double>& of_channels) const {
    Line line(width);
    for (int64_t i = 0; i < width; i += channels) std::copy_n(of_channels.data(), channels, line.data() + i);
    return line;
  }

  // Calls each(begin, numbers) for the lines of a chunk.
  template <class Each>
  void of_chunk(int64_t k, Each each) const {
    int64_t end = std::min((k + 1) * chunk, count);
    for (int64_t at = k * chunk; at < end; at += width) each(at, std::min(width, end - at));
  }
};

// ---- a line at a time ----

EACH_CPU void add_squares(const float* RESTRICT x, int64_t n, const float* RESTRICT origin, float* RESTRICT sum,
                          float* RESTRICT square) {
  for (int64_t i = 0; i < n; i++) {
    float d = x[i] - origin[i];
    sum[i] += d;
    square[i] += d * d;
  }
}

EACH_CPU void add_products(const float* RESTRICT g, const float* RESTRICT x, int64_t n, const float* RESTRICT mean,
                           float* RESTRICT sum, float* RESTRICT product) {
  for (int64_t i = 0; i < n; i++) {
    sum[i] += g[i];
    product[i] += g[i] * (x[i] - mean[i]);
  }
}

EACH_CPU void normalise(const float* RESTRICT x, int64_t n, const float* RESTRICT scale, const float* RESTRICT shift,
                        float* RESTRICT y) {
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale[i] + shift[i];
}

EACH_CPU void add(const float* RESTRICT x, int64_t n, float* RESTRICT y) {
  for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

EACH_CPU void rectify(int64_t n, float* RESTRICT y) {
  for (int64_t i = 0; i < n; i++) y[i] = y[i] < 0 ? 0 : y[i];  // nan stays nan
}

// g where a ReLU gave more than 0.
EACH_CPU void mask(const float* RESTRICT g, const float* RESTRICT y, int64_t n, float* RESTRICT out) {
  for (int64_t i = 0; i < n; i++) {
    float kept = g[i];
    out[i] = y[i] <= 0 ? 0 : kept;
  }
}

// The same, by the ReLU's input. The sum is computed as in normalise(), so that the sign is the same.
EACH_CPU void mask_again(const float* RESTRICT g, const float* RESTRICT x, int64_t n, const float* RESTRICT scale,
                         const float* RESTRICT shift, float* RESTRICT out) {
  for (int64_t i = 0; i < n; i++) {
    float kept = g[i], y = x[i] * scale[i] + shift[i];
    out[i] = y <= 0 ? 0 : kept;
  }
}

EACH_CPU void slope(const float* RESTRICT g, const float* RESTRICT x, int64_t n, const float* RESTRICT mean,
                    const float* RESTRICT a, const float* RESTRICT b, const float* RESTRICT c, float* RESTRICT dx) {
  for (int64_t i = 0; i < n; i++) dx[i] = a[i] * g[i] + (b[i] * (x[i] - mean[i]) + c[i]);
}

// Two rows of pixels, n numbers in all, to the mean of each 2 x 2 pixels.
EACH_CPU void pool(const float* RESTRICT y, int64_t n, int64_t channels, float* RESTRICT out) {
  const float *above = y, *below = y + n / 2;
  for (int64_t at = 0; at < n / 2; at += 2 * channels, out += channels)
    for (int64_t c = 0; c < channels; c++) {
      int64_t left = at + c, right = left + channels;
      out[c] = (above[left] + above[right] + below[left] + below[right]) * 0.25f;
    }
}

EACH_CPU void pool_backward(const float* RESTRICT gradient, int64_t n, int64_t channels, float* RESTRICT g) {
  float *above = g, *below = g + n / 2;
  for (int64_t at = 0; at < n / 2; at += 2 * channels, gradient += channels)
    for (int64_t c = 0; c < channels; c++) {
      int64_t left = at + c, right = left + channels;
      above[left] = above[right] = below[left] = below[right] = gradient[c] * 0.25f;
    }
}

// ---- a batch ----

// Sums over a batch of two numbers each, by channel: add_line(begin, n, first, second) adds a line's.
struct Sums {
  std::vector<double> first, second;

  template <class AddLine>
  Sums(const Lines& lines, int threads, AddLine add_line) : first(lines.channels), second(lines.channels) {
    const int64_t channels = lines.channels;
    std::vector<double> of_chunks(2 * lines.chunks * channels);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < lines.chunks; k++) {
      double* own = of_chunks.data() + 2 * k * channels;
      Line one(lines.width), two(lines.width);
      int64_t added = 0;
      auto flush = [&] {
        for (int64_t i = 0; i < lines.width; i += channels)
          for (int64_t c = 0; c < channels; c++) {
            own[c] += one[i + c];
            own[channels + c] += two[i + c];
          }
        std::fill(one.begin(), one.end(), 0.0f);
        std::fill(two.begin(), two.end(), 0.0f);
      };
      lines.of_chunk(k, [&](int64_t at, int64_t n) {
        add_line(at, n, one.data(), two.data());
        if (++added % EXACT == 0) flush();
      });
      flush();
    }
    for (int64_t k = 0; k < lines.chunks; k++)
      for (int64_t c = 0; c < channels; c++) {
        first[c] += of_chunks[2 * k * channels + c];
        second[c] += of_chunks[(2 * k + 1) * channels + c];
      }
  }
};

// norm(x) = scale x + shift
struct Affine {
  std::vector<double> scale, shift;

  Affine(int64_t channels, const float* weight, const float* bias, const float* mean, const float* rstd)
      : scale(channels), shift(channels) {
    for (int64_t c = 0; c < channels; c++) {
      scale[c] = double(weight[c]) * rstd[c];
      shift[c] = bias[c] - mean[c] * scale[c];
    }
  }
};

// A line of a pooled batch is two rows of pixels, `across` pixels each; others are as long as is fast.
Lines lines_of(int64_t rows, int64_t channels, int64_t across) {
  int64_t of_line = across ? 2 * across : std::max<int64_t>(1, WIDE / channels);
  return Lines(rows, channels, of_line * channels);
}

}  // namespace

extern "C" {

// x float32 [rows, channels] to y, and of each channel mean, variance (biased) and 1 / sqrt(variance + eps).
// shortcut [rows, channels] may be null. across: 0, or the pixels of an image's row, which are then pooled by 2 x 2.
void fastbd_batch_norm(const float* x, const float* shortcut, int64_t rows, int64_t channels, int64_t across, int relu,
                       const float* weight, const float* bias, double eps, int threads, float* mean, float* variance,
                       float* rstd, float* y) {
  const Lines lines = lines_of(rows, channels, across);
  // Numbers near the mean, so that their squares lose little.
  const Line origin = lines.widened(std::vector<double>(x, x + channels));
  const Sums sums(lines, threads, [&](int64_t at, int64_t n, float* sum, float* square) {
    add_squares(x + at, n, origin.data(), sum, square);
  });
  for (int64_t c = 0; c < channels; c++) {
    double offset = sums.first[c] / rows, var = std::max(0.0, sums.second[c] / rows - offset * offset);
    if (std::isnan(sums.second[c])) var = std::numeric_limits<double>::quiet_NaN();
    mean[c] = float(x[c] + offset);
    variance[c] = float(var);
    rstd[c] = float(1 / std::sqrt(var + eps));
  }
  const Affine norm(channels, weight, bias, mean, rstd);
  const Line scale = lines.widened(norm.scale), shift = lines.widened(norm.shift);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < lines.chunks; k++) {
    Line buffer(across ? lines.width : 0);
    lines.of_chunk(k, [&](int64_t at, int64_t n) {
      float* out = across ? buffer.data() : y + at;
      normalise(x + at, n, scale.data(), shift.data(), out);
      if (shortcut) add(shortcut + at, n, out);
      if (relu) rectify(n, out);
      if (across) pool(out, n, channels, y + at / 4);
    });
  }
}

// Gradients of x, weight and bias, and of the shortcut where it is asked for, from that of the output; y is the output
// where there were a shortcut and a ReLU, else null.
void fastbd_batch_norm_backward(const float* gradient, const float* x, const float* y, int64_t rows, int64_t channels,
                                int64_t across, int relu, const float* weight, const float* bias, const float* mean,
                                const float* rstd, int threads, float* dx, float* dshortcut, float* dweight,
                                float* dbias) {
  const Lines lines = lines_of(rows, channels, across);
  const Affine norm(channels, weight, bias, mean, rstd);
  const Line scale = lines.widened(norm.scale), shift = lines.widened(norm.shift);
  const Line means = lines.widened(std::vector<double>(mean, mean + channels));

  // A line of g, the gradient of norm(x) + shortcut: where it lies, or made in `out`. `spare` has room for a line.
  auto line_of_g = [&](int64_t at, int64_t n, float* out, float* spare) -> const float* {
    const float* g = gradient + at;
    if (across) {
      pool_backward(gradient + at / 4, n, channels, spare);
      g = spare;
    }
    if (relu && y) mask(g, y + at, n, out);
    if (relu && !y) mask_again(g, x + at, n, scale.data(), shift.data(), out);
    return relu ? out : g;
  };
  const Sums sums(lines, threads, [&](int64_t at, int64_t n, float* sum, float* product) {
    static thread_local Line buffer;
    buffer.resize(2 * lines.width);
    const float* g = line_of_g(at, n, dshortcut ? dshortcut + at : buffer.data(), buffer.data() + lines.width);
    add_products(g, x + at, n, means.data(), sum, product);
  });
  std::vector<double> a(channels), b(channels), c(channels);
  for (int64_t k = 0; k < channels; k++) {
    double r = rstd[k];
    dweight[k] = float(sums.second[k] * r);
    dbias[k] = float(sums.first[k]);
    a[k] = norm.scale[k];
    b[k] = -norm.scale[k] * r * r * sums.second[k] / rows;
    c[k] = -norm.scale[k] * sums.first[k] / rows;
  }
  const Line as = lines.widened(a), bs = lines.widened(b), cs = lines.widened(c);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < lines.chunks; k++) {
    Line buffer(2 * lines.width);
    lines.of_chunk(k, [&](int64_t at, int64_t n) {
      const float* g = dshortcut ? dshortcut + at : line_of_g(at, n, buffer.data(), buffer.data() + lines.width);
      slope(g, x + at, n, means.data(), as.data(), bs.data(), cs.data(), dx + at);
    });
  }
}

}  // extern "C"
