// Views of images on a CPU, byte for byte those of augment_reference.py, several times as fast. Called by
// augment_native.py: one call takes the images of a task, without Python's lock, in the thread that calls.
//
// The pixels' loops are in views_loops.h, which is compiled once for any processor and once more for those with AVX2.
// Floating point is exact: build with -ffp-contract=off, as a fused multiply-add rounds once where the reference rounds
// twice.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Byte = uint8_t;

// What views.py packs: OPERATION, PARAMS and the codes. `view_layout` below lets Python compare.
enum Code {
  NONE,
  AFFINE,
  POSTERIZE,
  SOLARIZE,
  BRIGHTNESS,
  COLOR,
  CONTRAST,
  SHARPNESS,
  EQUALIZE,
  AUTOCONTRAST,
  HUE,
  BLUR
};

struct Operation {
  int32_t code;
  int32_t args[6];
};

constexpr int BEFORE = 2, AFTER = 6;

struct Params {
  Operation before[BEFORE];
  int32_t box[4];
  int32_t resized[2];
  int32_t window[2];
  Operation after[AFTER];
  int32_t flip;
  int32_t noise[3];
  int32_t erase[4];
};

enum Kind { UINT8, FLOAT32, BFLOAT16 };  // of the output
constexpr int WIDTHS[] = {1, 4, 2};      // bytes of a value

float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Shape {
  int height, width;
  size_t bytes() const { return size_t(height) * width * 3; }
  size_t stride() const { return size_t(width) * 3; }
};

// Rows [top, bottom) and columns [left, right).
struct Region {
  int top, left, bottom, right;
};

// How one axis is resized: output o is the sum of `taps` inputs from first[o] on, each times its weight, over 2^bits.
// Weights can be taken two by two, as an odd number of them is followed by a 0; so can the inputs with `even`, as
// first[o] is.
struct Axis {
  int inputs = 0, outputs = 0;
  bool cubic = false, even = false;
  int taps = 0, stride = 0, bits = 0;
  std::vector<int> first;
  std::vector<int16_t> weights;

  bool is(int from, int to, bool with_cubic, bool with_even) const {
    return inputs == from && outputs == to && cubic == with_cubic && even == with_even;
  }
  const int16_t* weights_of(int output) const { return weights.data() + size_t(output) * stride; }
};

// Pillow's filters, as PyTorch evaluates them in double.
double filtered(double x, bool cubic) {
  x = std::fabs(x);
  if (!cubic) return x < 1 ? 1 - x : 0;
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * -0.5;
  return 0;
}

// PyTorch's arithmetic for uint8: weights in double that sum to 1, then as many bits in int16 as the largest one of the
// whole axis allows.
Axis axis_of(int inputs, int outputs, bool cubic, bool even) {
  Axis axis;
  axis.inputs = inputs, axis.outputs = outputs, axis.cubic = cubic, axis.even = even;
  axis.first.resize(outputs);
  if (inputs == outputs) {  // beside an axis that is resized: as it is
    axis.taps = axis.stride = 2, axis.bits = 14;
    axis.weights.assign(size_t(outputs) * 2, 0);
    for (int o = 0; o < outputs; o++) {
      axis.first[o] = even ? o & ~1 : o;
      axis.weights[2 * size_t(o) + (o - axis.first[o])] = 1 << 14;
    }
    return axis;
  }
  const double scale = double(inputs) / outputs, reach = std::max(scale, 1.0), inverse = 1 / reach;
  const double support = reach * (cubic ? 2 : 1);
  const int room = int(std::ceil(support)) * 2 + 1;
  std::vector<double> exact(size_t(outputs) * room, 0.0);
  std::vector<int> counts(outputs);
  double largest = 0;
  for (int o = 0; o < outputs; o++) {
    const double centre = scale * (o + 0.5);
    const int low = std::max(int(centre - support + 0.5), 0);
    const int count = std::min(std::max(std::min(int(centre + support + 0.5), inputs) - low, 0), room);
    double* weights = exact.data() + size_t(o) * room;
    double sum = 0;
    for (int k = 0; k < count; k++) sum += weights[k] = filtered((low + k - centre + 0.5) * inverse, cubic);
    for (int k = 0; sum != 0 && k < count; k++) largest = std::max(largest, weights[k] /= sum);
    axis.first[o] = low, counts[o] = count;
    axis.taps = std::max(axis.taps, count + (even ? low & 1 : 0));
  }
  for (double doubled = largest * 2; axis.bits < 22 && doubled + 0.5 < 32768; doubled *= 2) axis.bits++;
  axis.stride = (axis.taps + 1) & ~1;
  axis.weights.assign(size_t(outputs) * axis.stride, 0);
  for (int o = 0; o < outputs; o++) {
    const int skipped = even ? axis.first[o] & 1 : 0;
    axis.first[o] -= skipped;
    for (int k = 0; k < counts[o]; k++) {
      const double scaled = exact[size_t(o) * room + k] * (1 << axis.bits);
      axis.weights[size_t(o) * axis.stride + skipped + k] = int16_t(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
  }
  return axis;
}

// Axes that a thread has met, each in the one slot that its sizes choose: images of a set share some sizes.
class Axes {
 public:
  // Valid until the next such axis, with the same `even`, is asked for.
  const Axis& get(int inputs, int outputs, bool cubic, bool even) {
    Axis& axis = kept_[even][(31 * unsigned(inputs) + unsigned(outputs)) % SLOTS];
    if (!axis.is(inputs, outputs, cubic, even)) axis = axis_of(inputs, outputs, cubic, even);
    return axis;
  }

 private:
  static constexpr int SLOTS = 128;
  std::array<Axis, SLOTS> kept_[2];
};

// A table for each channel, of operations that look at nothing but a level, and the histograms behind some of them.
using Table = std::array<Byte, 256>;
using Counts = std::array<uint32_t, 256>;
template <class T>
using Channels = std::array<T, 3>;

Byte clipped(float x) {
  x = x > 0 ? x : 0;  // what is not a number, too
  return Byte(int(x < 255 ? x : 255));
}

float blended(float other, float x, float factor) {
  x = x - other;
  x = x * factor;
  return x + other;
}

Table equalized(const Counts& counts) {
  int brightest = 255;
  while (brightest > 0 && !counts[brightest]) brightest--;
  int64_t darker = 0, below = 0;
  for (int k = 0; k < brightest; k++) darker += counts[k];
  const int64_t step = darker / 255;
  Table table;
  for (int k = 0; k < 256; k++) {
    table[k] = Byte(step > 0 ? std::min<int64_t>((step / 2 + below) / step, 255) : k);
    below += counts[k];
  }
  return table;
}

Table stretched(const Counts& counts) {
  int low = 0, high = 255;
  while (low < 255 && !counts[low]) low++;
  while (high > 0 && !counts[high]) high--;
  const double scale = 255.0 / std::max(high - low, 1);
  Table table;
  for (int k = 0; k < 256; k++) {
    const double x = k * scale - low * scale;
    table[k] = Byte(high > low ? std::min(std::max(x, 0.0), 255.0) : k);
  }
  return table;
}

// Of operations that need no histogram; `mean` is CONTRAST's.
Table table_of(const Operation& operation, int mean) {
  const int32_t arg = operation.args[0];
  Table table;
  for (int k = 0; k < 256; k++) switch (operation.code) {
      case POSTERIZE: table[k] = Byte(k & arg); break;
      case SOLARIZE: table[k] = Byte(k < arg ? k : 255 - k); break;
      case BRIGHTNESS: table[k] = clipped(blended(0, float(k), as_float(arg))); break;
      case CONTRAST: table[k] = clipped(blended(float(mean), float(k), as_float(arg))); break;
      default: table[k] = Byte(k);
    }
  return table;
}

// The histogram of an image that went through a table.
Counts through(const Table& table, const Counts& counts) {
  Counts made{};
  for (int k = 0; k < 256; k++) made[table[k]] += counts[k];
  return made;
}

void then(Table& first, const Table& second) {
  for (Byte& level : first) level = second[level];
}

bool looks_at_levels_alone(int code) {
  return code == POSTERIZE || code == SOLARIZE || code == BRIGHTNESS || code == CONTRAST || code == EQUALIZE ||
         code == AUTOCONTRAST;
}

// What an operation reads to make a region.
Region read_by(const Operation& operation, Region made, Shape shape) {
  switch (operation.code) {
    case NONE:
    case POSTERIZE:
    case SOLARIZE:
    case BRIGHTNESS:
    case COLOR:
    case HUE: return made;
    case SHARPNESS: return {std::max(made.top - 1, 0), 0, std::min(made.bottom + 1, shape.height), shape.width};
    default: return {0, 0, shape.height, shape.width};
  }
}

// Memory of one thread, taken again for the next image.
struct Scratch {
  std::vector<Byte> images[2], squares[2];  // of operations before and after the resize
  std::vector<Byte> others, before;         // of a single operation
  std::vector<uint16_t> columns;
  std::vector<const Byte*> lines;
  std::vector<Byte> edge, rows, line;  // of the resize
  Axes axes;
  std::vector<Byte> turned;  // of a row that is finished
  std::vector<float> values;
  std::vector<uint16_t> narrowed;
  std::vector<uint32_t> words;

  size_t bytes() const { return images[0].capacity() + images[1].capacity() + before.capacity() + rows.capacity(); }
};

template <class T>
T* room(std::vector<T>& memory, size_t count) {
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

constexpr size_t PADDING = 64;  // bytes after scratch memory, for loads and stores that are wider than what is left

// What all views of a call have in common.
struct Job {
  int size;
  bool cubic;
  Kind kind;
  const float* normalisation;  // scale of each value of a row [3 size], then its shift
  const float* noise_levels;   // [65536]
};

// A view can be made if it reads and writes nothing outside of its images.
bool possible(const Params& view, Shape shape, int size) {
  const auto [top, left, height, width] = view.box;
  const auto [tall, wide] = view.resized;
  const bool boxed = top >= 0 && left >= 0 && height > 0 && width > 0 && top <= shape.height - height &&
                     left <= shape.width - width;
  const bool whole = tall == size && wide == size;  // without a window
  const bool cut = view.window[0] >= 0 && view.window[1] >= 0 && view.window[0] <= tall - size &&
                   view.window[1] <= wide - size;
  bool blurs = true;
  for (const Operation& operation : view.before) blurs &= operation.code != BLUR || operation.args[0] >= 0;
  for (const Operation& operation : view.after) blurs &= operation.code != BLUR || operation.args[0] >= 0;
  return boxed && (whole || cut) && blurs;
}

using Render = void (*)(const Byte*, Shape, const Params&, const Job&, Scratch&, void*);

namespace portable {
#include "views_loops.h"
}

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define FASTBD_AVX2
namespace avx2 {
#include "views_loops.h"
}
#undef FASTBD_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

}  // namespace

extern "C" {

// Bytes of Params and before each of its fields, as numpy has them in views.PARAMS.
extern const int32_t view_layout[] = {
    sizeof(Params),          offsetof(Params, before), offsetof(Params, box),   offsetof(Params, resized),
    offsetof(Params, window), offsetof(Params, after),  offsetof(Params, flip), offsetof(Params, noise),
    offsetof(Params, erase), sizeof(Operation)};

// The ways that this processor has: 1 portable, 2 AVX2 too.
int32_t ways() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return 2;
#endif
  return 1;
}

// Make a view of each of `count` images [H, W, 3] at `addresses`, of `sizes` [count, 2], into `out`
// [count, size, size, 3]. Returns the number of the first one that is not possible, -1 if all are made, -2 if there is
// no memory.
int64_t render(const int64_t* addresses, const int32_t* sizes, const Params* params, int64_t count, int32_t size,
               int32_t cubic, int32_t kind, const float* normalisation, const float* noise_levels, int32_t way,
               void* out) {
  static thread_local Scratch scratch;
  constexpr size_t KEPT = 32 << 20;  // bytes that a thread keeps for the next call
  const Job job{size, cubic != 0, Kind(kind), normalisation, noise_levels};
  Render one = portable::render;
#if defined(__x86_64__)
  if (way == 2) one = avx2::render;
#endif
  const size_t bytes = size_t(size) * size * 3 * WIDTHS[kind];
  try {
    for (int64_t i = 0; i < count; i++) {
      const Shape shape{sizes[2 * i], sizes[2 * i + 1]};
      if (!possible(params[i], shape, size)) return i;
      const Byte* image = reinterpret_cast<const Byte*>(addresses[i]);
      one(image, shape, params[i], job, scratch, static_cast<Byte*>(out) + i * bytes);
    }
#if defined(__x86_64__)
    _mm_sfence();  // stores past the caches are ordered by nothing else
#endif
    if (scratch.bytes() > KEPT) scratch = Scratch();
  } catch (const std::bad_alloc&) {
    return -2;
  }
  return -1;
}
}
