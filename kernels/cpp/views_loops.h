// The loops of views.cpp over pixels, included there in a namespace for each kind of processor. Most are left to the
// compiler's vectoriser; where FASTBD_AVX2 is defined, the hottest are written in its instructions.

// Operations on levels.

// q = other + factor (p - other), clipped and truncated like Pillow's blend.
void blend(const Byte* __restrict other, const Byte* __restrict p, Byte* __restrict q, int n, float factor) {
  for (int i = 0; i < n; i++) q[i] = clipped(blended(float(other[i]), float(p[i]), factor));
}

// Pillow's luma (ITU-R 601 in 16-bit fixed point).
inline int grey(const Byte* p) { return (19595 * p[0] + 38470 * p[1] + 7471 * p[2] + 32768) >> 16; }

// The luma of n pixels, three times each; up to 4 bytes more are written.
void greys(const Byte* p, Byte* q, int n) {
  int i = 0;
#ifdef FASTBD_AVX2
  const __m256i red_green = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 1, -1, 3, -1, 4, -1, 6, -1, 7, -1, 9, -1, 10, -1));
  const __m256i green_blue = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(1, -1, 2, -1, 4, -1, 5, -1, 7, -1, 8, -1, 10, -1, 11, -1));
  const __m256i thrice = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0, 0, 4, 4, 4, 8, 8, 8, 12, 12, 12, -1, -1, -1, -1));
  // Green's weight is too large for 16 bits and goes in two halves.
  const __m256i first = _mm256_set1_epi32(19595 | 19235 << 16), second = _mm256_set1_epi32(19235 | 7471 << 16);
  const __m256i half = _mm256_set1_epi32(32768);
  for (; i + 10 <= n; i += 8) {  // eight pixels, of loads that reach over nearly two more
    const __m256i pixels = _mm256_loadu2_m128i((const __m128i*)(p + 3 * i + 12), (const __m128i*)(p + 3 * i));
    __m256i sum = _mm256_add_epi32(half, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, red_green), first));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, green_blue), second));
    const __m256i made = _mm256_shuffle_epi8(_mm256_srli_epi32(sum, 16), thrice);
    _mm_storeu_si128((__m128i*)(q + 3 * i), _mm256_castsi256_si128(made));
    _mm_storeu_si128((__m128i*)(q + 3 * i + 12), _mm256_extracti128_si256(made, 1));
  }
#endif
  for (; i < n; i++) q[3 * i] = q[3 * i + 1] = q[3 * i + 2] = Byte(grey(p + 3 * i));
}

// Mean luma of n pixels, rounded half up.
int mean_grey(const Byte* p, size_t n, Scratch& scratch) {
  constexpr size_t PART = 1024;
  Byte* part = room(scratch.others, 3 * PART + PADDING);
  uint64_t sum = 0;
  for (size_t start = 0; start < n; start += PART) {
    const int count = int(std::min(PART, n - start));
    greys(p + 3 * start, part, count);
    uint32_t thrice = 0;
    for (int i = 0; i < 3 * count; i++) thrice += part[i];
    sum += thrice / 3;
  }
  return int((2 * sum + n) / (2 * n));
}

Channels<Counts> histogram(const Byte* p, size_t n) {
  // Four sets in turn: where neighbours are alike, each count would else wait for the one before.
  Channels<Counts> sets[4] = {};
  size_t i = 0;
  for (; i + 4 <= n; i += 4, p += 12)
    for (int set = 0; set < 4; set++)
      for (int channel = 0; channel < 3; channel++) sets[set][channel][p[3 * set + channel]]++;
  for (; i < n; i++, p += 3)
    for (int channel = 0; channel < 3; channel++) sets[0][channel][p[channel]]++;
  for (int channel = 0; channel < 3; channel++)
    for (int k = 0; k < 256; k++)
      sets[0][channel][k] += sets[1][channel][k] + sets[2][channel][k] + sets[3][channel][k];
  return sets[0];
}

void look_up(const Byte* __restrict p, Byte* __restrict q, int n, const Channels<Table>& tables) {
  for (int i = 0; i < n; i++, p += 3, q += 3) {
    q[0] = tables[0][p[0]];
    q[1] = tables[1][p[1]];
    q[2] = tables[2][p[2]];
  }
}

// Through Pillow's 8-bit HSV and back. Single and double precision in turns, as there.
void shift_hue(const Byte* __restrict p, Byte* __restrict q, int n, int shift) {
  for (int i = 0; i < n; i++, p += 3, q += 3) {
    const int r = p[0], g = p[1], b = p[2], value = std::max(r, std::max(g, b));
    const int spread = value - std::min(r, std::min(g, b));
    // Where grey, dividing by 1 instead of 0 leaves hue and saturation 0, as they must be.
    const float by = float(std::max(spread, 1));
    const float red = float(value - r) / by, green = float(value - g) / by, blue = float(value - b) / by;
    const float x = r == value   ? blue - green
                    : g == value ? float(2 + double(red) - double(blue))
                                 : float(4 + double(green) - double(red));
    double turn = double(x) / 6 + 1;
    turn = double(float(turn - int(turn)));
    const Byte hue = Byte(int(turn * 255) + shift);
    const int saturation = int(double(float(spread) / float(std::max(value, 1))) * 255);

    const double sixth = hue * 6.0 / 255;
    const int sector = int(sixth);
    const double part = double(float(sixth - sector)), s = double(float(saturation / 255.0)), v = value;
    const Byte low = Byte(int((1 - s) * v + 0.5)), down = Byte(int((1 - s * part) * v + 0.5));
    const Byte up = Byte(int((1 - s * (1 - part)) * v + 0.5)), top = Byte(value);
    switch (sector) {
      case 1: q[0] = down, q[1] = top, q[2] = low; break;
      case 2: q[0] = low, q[1] = top, q[2] = up; break;
      case 3: q[0] = low, q[1] = down, q[2] = top; break;
      case 4: q[0] = up, q[1] = low, q[2] = top; break;
      case 5: q[0] = top, q[1] = low, q[2] = down; break;
      default: q[0] = top, q[1] = up, q[2] = low;
    }
  }
}

// Operations that look at other pixels.

// Each pixel from the nearest one at x' = a x + b y + c and y' likewise, in 16.16 fixed point that wraps around.
void affine(const Byte* p, Byte* q, Shape shape, Region made, const int32_t* args) {
  const uint32_t a = args[0], b = args[1], c = args[2], d = args[3], e = args[4], f = args[5];
  for (int y = made.top; y < made.bottom; y++) {
    const uint32_t row_x = c + b * uint32_t(y), row_y = f + e * uint32_t(y);
    Byte* to = q + y * shape.stride();
    for (int x = made.left; x < made.right; x++) {
      const int from_x = int32_t(row_x + a * uint32_t(x)) >> 16, from_y = int32_t(row_y + d * uint32_t(x)) >> 16;
      const bool inside = unsigned(from_x) < unsigned(shape.width) && unsigned(from_y) < unsigned(shape.height);
      if (inside)
        std::memcpy(to + 3 * x, p + from_y * shape.stride() + 3 * from_x, 3);
      else
        std::memset(to + 3 * x, 0, 3);
    }
  }
}

// Blended with the mean of the pixels around, itself counted five times; at the border with itself.
void sharpen(const Byte* p, Byte* q, Shape shape, Region made, float factor, Scratch& scratch) {
  const int n = int(shape.stride());
  const size_t stride = shape.stride();
  Byte* smooth = room(scratch.others, 3 * stride);
  uint16_t* columns = reinterpret_cast<uint16_t*>(smooth + stride + (stride & 1));
  for (int y = made.top; y < made.bottom; y++) {
    const Byte* row = p + y * stride;
    std::memcpy(smooth, row, stride);
    if (y > 0 && y < shape.height - 1) {
      for (int i = 0; i < n; i++) columns[i] = uint16_t(row[i - ptrdiff_t(stride)] + row[i] + row[i + stride]);
      for (int i = 3; i < n - 3; i++) {
        const uint16_t sum = uint16_t(columns[i - 3] + columns[i] + columns[i + 3] + 4 * row[i]);
        smooth[i] = Byte(uint16_t(sum + 6) / 13);  // rounded: halves are not possible
      }
    }
    blend(smooth, row, q + y * stride, n, factor);
  }
}

// `box` times the sum of the inner lines and `ends` times that of the two outer ones, over 2^24, rounded.
void box_sum(const Byte* const* lines, int count, Byte* __restrict q, int n, uint32_t box, uint32_t ends,
             uint32_t* __restrict sums) {
  std::fill(sums, sums + n, 0);
  for (int k = 1; k < count - 1; k++) {
    const Byte* __restrict line = lines[k];
    for (int i = 0; i < n; i++) sums[i] += line[i];
  }
  const Byte *__restrict first = lines[0], *__restrict last = lines[count - 1];
  for (int i = 0; i < n; i++) {
    const uint32_t outer = uint32_t(first[i]) + last[i];
    q[i] = Byte((sums[i] * box + outer * ends + (1u << 23)) >> 24);
  }
}

// Pillow's GaussianBlur: three box blurs along the rows, then three along the columns. The edge goes on outside.
void blur(const Byte* p, Byte* q, Shape shape, const int32_t* args, Scratch& scratch) {
  const int radius = args[0], count = 2 * radius + 3, n = int(shape.stride());
  const uint32_t box = uint32_t(args[1]), ends = uint32_t(args[2]);
  const size_t stride = shape.stride(), side = 3 * (size_t(radius) + 1);
  uint32_t* sums = room(scratch.words, stride);
  std::vector<const Byte*> lines(count);
  Byte* padded = room(scratch.others, stride + 2 * side);
  for (int k = 0; k < count; k++) lines[k] = padded + 3 * size_t(k);
  for (int y = 0; y < shape.height; y++) {
    for (int turn = 0; turn < 3; turn++) {
      const Byte* row = (turn ? q : p) + y * stride;
      for (size_t i = 0; i < side; i++) padded[i] = row[i % 3], padded[side + stride + i] = row[stride - 3 + i % 3];
      std::memcpy(padded + side, row, stride);
      box_sum(lines.data(), count, q + y * stride, n, box, ends, sums);
    }
  }
  std::vector<Byte> other(shape.bytes());
  for (int turn = 0; turn < 3; turn++) {
    std::memcpy(other.data(), q, shape.bytes());
    for (int y = 0; y < shape.height; y++) {
      for (int k = 0; k < count; k++) {
        const int from = std::min(std::max(y + k - radius - 1, 0), shape.height - 1);
        lines[k] = other.data() + from * stride;
      }
      box_sum(lines.data(), count, q + y * stride, n, box, ends, sums);
    }
  }
}

// An image on its way through operations. Those that look at levels alone are collected into one table for each
// channel, which is looked up when something else comes.
class Chain {
 public:
  Chain(const Byte* image, Shape shape, std::vector<Byte>* buffers, Scratch& scratch)
      : image_(image), shape_(shape), buffers_(buffers), scratch_(scratch) {}

  // The image after `count` operations, of which nothing but `wanted` is made.
  const Byte* run(const Operation* operations, int count, Region wanted) {
    Region read[std::max(BEFORE, AFTER) + 1];
    read[count] = wanted;
    for (int k = count - 1; k >= 0; k--) read[k] = read_by(operations[k], read[k + 1], shape_);
    for (int k = 0; k < count; k++) {
      if (looks_at_levels_alone(operations[k].code))
        collect(operations[k], read[k]);
      else if (operations[k].code > NONE && operations[k].code <= BLUR)
        apply(operations[k], read[k], read[k + 1]);
    }
    look_up_collected(wanted);
    return image_;
  }

 private:
  void collect(const Operation& operation, Region read) {
    const bool counts = operation.code == EQUALIZE || operation.code == AUTOCONTRAST;
    int mean = 0;
    if (operation.code == CONTRAST) {
      look_up_collected(read);
      mean = mean_grey(image_, size_t(shape_.height) * shape_.width, scratch_);
    }
    if (counts && !counted_) histogram_ = histogram(image_, size_t(shape_.height) * shape_.width);
    counted_ |= counts;
    if (!collected_) std::fill(tables_.begin(), tables_.end(), table_of({NONE, {}}, 0));
    collected_ = true;
    for (int channel = 0; channel < 3; channel++) {
      Table& table = tables_[channel];
      if (operation.code == EQUALIZE)
        then(table, equalized(through(table, histogram_[channel])));
      else if (operation.code == AUTOCONTRAST)
        then(table, stretched(through(table, histogram_[channel])));
      else
        then(table, table_of(operation, mean));
    }
  }

  void look_up_collected(Region made) {
    if (!collected_) return;
    Byte* to = next();
    for (int y = made.top; y < made.bottom; y++) {
      const size_t start = y * shape_.stride() + 3 * size_t(made.left);
      look_up(image_ + start, to + start, made.right - made.left, tables_);
    }
    moved(to);
  }

  void apply(const Operation& operation, Region read, Region made) {
    look_up_collected(read);
    Byte* to = next();
    const float factor = as_float(operation.args[0]);
    switch (operation.code) {
      case AFFINE: affine(image_, to, shape_, made, operation.args); break;
      case SHARPNESS: sharpen(image_, to, shape_, made, factor, scratch_); break;
      case BLUR: blur(image_, to, shape_, operation.args, scratch_); break;
      default:  // COLOR and HUE, pixel by pixel
        for (int y = made.top; y < made.bottom; y++) {
          const size_t start = y * shape_.stride() + 3 * size_t(made.left);
          const int n = made.right - made.left;
          if (operation.code == COLOR) {
            Byte* other = room(scratch_.others, 3 * size_t(n) + PADDING);
            greys(image_ + start, other, n);
            blend(other, image_ + start, to + start, 3 * n, factor);
          } else {
            shift_hue(image_ + start, to + start, n, operation.args[0]);
          }
        }
    }
    moved(to);
  }

  Byte* next() {
    const bool first = image_ != buffers_[0].data();
    return room(buffers_[first ? 0 : 1], shape_.bytes() + PADDING);
  }

  void moved(Byte* to) {
    image_ = to;
    collected_ = counted_ = false;
  }

  const Byte* image_;
  Shape shape_;
  std::vector<Byte>* buffers_;
  Scratch& scratch_;
  bool collected_ = false, counted_ = false;
  Channels<Table> tables_;
  Channels<Counts> histogram_;
};

// Resizing: four rows at once along x into a buffer, from which each row of the view is summed along y.

// Bytes of a row in that buffer. With AVX2 two rows lie there byte by byte in turns.
size_t buffer_stride(int size) { return (3 * size_t(size) + 31) / 32 * 32 + 32; }

#ifdef FASTBD_AVX2

// The window's columns of four rows. Rows are read up to 16 bytes past the last tap.
void along_x(const Byte* const* rows, const Axis& axis, int start, int size, Byte* out) {
  // Of 16 bytes two pixels as pairs of 16 bits for each channel, then the next two.
  const __m256i near = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
  const __m256i far = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  const __m128i paired = _mm_setr_epi8(0, 4, 1, 5, 2, 6, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i half = _mm256_set1_epi32(1 << axis.bits >> 1);
  const __m128i shift = _mm_cvtsi32_si128(axis.bits);
  const size_t pair = 2 * buffer_stride(size);
  for (int o = 0; o < size; o++) {
    const size_t from = 3 * size_t(axis.first[start + o]);
    const int16_t* weights = axis.weights_of(start + o);
    __m256i sums[2] = {half, half};
    int k = 0;
    for (; k + 4 <= axis.taps; k += 4) {
      int32_t two[2];
      std::memcpy(two, weights + k, 8);
      const __m256i first = _mm256_set1_epi32(two[0]), second = _mm256_set1_epi32(two[1]);
      for (int r = 0; r < 2; r++) {
        const __m256i pixels = _mm256_loadu2_m128i((const __m128i*)(rows[2 * r + 1] + from + 3 * k),
                                                   (const __m128i*)(rows[2 * r] + from + 3 * k));
        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, near), first));
        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, far), second));
      }
    }
    if (k < axis.taps) {
      int32_t two;
      std::memcpy(&two, weights + k, 4);
      for (int r = 0; r < 2; r++) {
        const __m256i pixels = _mm256_loadu2_m128i((const __m128i*)(rows[2 * r + 1] + from + 3 * k),
                                                   (const __m128i*)(rows[2 * r] + from + 3 * k));
        sums[r] = _mm256_add_epi32(
            sums[r], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, near), _mm256_set1_epi32(two)));
      }
    }
    for (int r = 0; r < 2; r++) {
      const __m256i sum = _mm256_sra_epi32(sums[r], shift);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
      const __m128i bytes = _mm_shuffle_epi8(_mm_packus_epi16(words, words), paired);
      _mm_storel_epi64((__m128i*)(out + r * pair + 6 * size_t(o)), bytes);
    }
  }
}

// Output `o` of the sums over the rows of the buffer that begin with the axis's input `top`, an even one.
void along_y(const Byte* buffer, const Axis& axis, int o, int top, int size, Byte* line) {
  const size_t pair = 2 * buffer_stride(size);
  const Byte* from = buffer + size_t(axis.first[o] - top) / 2 * pair;
  const int16_t* weights = axis.weights_of(o);
  const __m256i half = _mm256_set1_epi32(1 << axis.bits >> 1);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m128i shift = _mm_cvtsi32_si128(axis.bits);
  for (int i = 0; i < 3 * size; i += 32) {
    __m256i sums[4] = {half, half, half, half};
    for (int k = 0; k < axis.taps; k += 2) {
      int32_t two;
      std::memcpy(&two, weights + k, 4);
      const __m256i weight = _mm256_set1_epi32(two);
      const Byte* bytes = from + k / 2 * pair + 2 * size_t(i);
      for (int part = 0; part < 4; part++) {
        const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(bytes + 16 * part)));
        sums[part] = _mm256_add_epi32(sums[part], _mm256_madd_epi16(pairs, weight));
      }
    }
    for (__m256i& sum : sums) sum = _mm256_sra_epi32(sum, shift);
    const __m256i words[2] = {_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3])};
    const __m256i levels = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words[0], words[1]), order);
    _mm256_storeu_si256((__m256i*)(line + i), levels);
  }
}

#else

inline Byte rounded(int32_t sum, int bits) { return Byte(std::min(std::max(sum >> bits, 0), 255)); }

void along_x(const Byte* const* rows, const Axis& axis, int start, int size, Byte* out) {
  const int32_t half = 1 << axis.bits >> 1;
  for (int r = 0; r < 4; r++, out += buffer_stride(size)) {
    for (int o = 0; o < size; o++) {
      const Byte* from = rows[r] + 3 * size_t(axis.first[start + o]);
      const int16_t* weights = axis.weights_of(start + o);
      int32_t red = half, green = half, blue = half;
      for (int k = 0; k < axis.taps; k++) {
        red += weights[k] * from[3 * k];
        green += weights[k] * from[3 * k + 1];
        blue += weights[k] * from[3 * k + 2];
      }
      out[3 * o] = rounded(red, axis.bits);
      out[3 * o + 1] = rounded(green, axis.bits);
      out[3 * o + 2] = rounded(blue, axis.bits);
    }
  }
}

void along_y(const Byte* buffer, const Axis& axis, int o, int top, int size, Byte* line) {
  constexpr int PART = 256;
  const size_t stride = buffer_stride(size);
  const int16_t* weights = axis.weights_of(o);
  for (int start = 0; start < 3 * size; start += PART) {
    const int count = std::min(PART, 3 * size - start);
    int32_t sums[PART];
    std::fill(sums, sums + count, 1 << axis.bits >> 1);
    for (int k = 0; k < axis.taps; k++) {
      const Byte* from = buffer + size_t(axis.first[o] - top + k) * stride + start;
      const int16_t weight = weights[k];
      for (int i = 0; i < count; i++) sums[i] += weight * int16_t(from[i]);
    }
    for (int i = 0; i < count; i++) line[start + i] = rounded(sums[i], axis.bits);
  }
}

#endif

// The inputs of an axis from which the window [start, start + size) of the outputs is made.
inline void taken(const Axis& axis, int start, int size, int& first, int& end) {
  first = axis.first[start];
  end = std::min(axis.first[start + size - 1] + axis.taps, axis.inputs);
}

// Source rows for along_x, which reads past their ends: those near the end of the memory are copied.
class SourceRows {
 public:
  SourceRows(const Byte* image, Shape shape, const Region& box, int taps, std::vector<Byte>& edge)
      : image_(image), shape_(shape), box_(box), over_(3 * size_t(taps) + 16), edge_(edge) {}

  void four(int from, int end, const Byte** rows) {
    const size_t width = 3 * size_t(box_.right - box_.left), room_of_one = width + over_;
    for (int r = 0; r < 4; r++) {
      const size_t start = (box_.top + std::min(from + r, end - 1)) * shape_.stride() + 3 * size_t(box_.left);
      rows[r] = image_ + start;
      if (start + room_of_one > shape_.bytes()) {
        Byte* copy = room(edge_, 4 * room_of_one) + r * room_of_one;
        std::memcpy(copy, rows[r], width);
        rows[r] = copy;
      }
    }
  }

 private:
  const Byte* image_;
  Shape shape_;
  Region box_;
  size_t over_;
  std::vector<Byte>& edge_;
};

// Where a crop is to be read, and how its axes are resized; no axes where they stay as they are.
struct Plan {
  Region box;
  int top, left;  // of the window
  const Axis *y, *x;
};

Plan plan_of(const Params& view, const Job& job, Axes& axes) {
  const auto [top, left, height, width] = view.box;
  const auto [tall, wide] = view.resized;
  Plan plan{{top, left, top + height, left + width}, view.window[0], view.window[1], nullptr, nullptr};
  if (tall == job.size && wide == job.size) plan.top = plan.left = 0;
  if (tall != height || wide != width) {
    plan.y = &axes.get(height, tall, job.cubic, true);
    plan.x = &axes.get(width, wide, job.cubic, false);
  }
  return plan;
}

// What of the source has to be there.
Region read_by(const Plan& plan, int size) {
  int top = plan.top, left = plan.left, bottom = top + size, right = left + size;
  if (plan.y) {
    taken(*plan.y, plan.top, size, top, bottom);
    taken(*plan.x, plan.left, size, left, right);
  }
  return {plan.box.top + top, plan.box.left + left, plan.box.top + bottom, plan.box.left + right};
}

// Calls row(o, line) with each row of the view's square.
template <class Row>
void resize(const Byte* image, Shape shape, const Plan& plan, int size, Scratch& scratch, Row row) {
  if (!plan.y) {
    const size_t left = 3 * size_t(plan.box.left + plan.left);
    for (int o = 0; o < size; o++) row(o, image + (plan.box.top + plan.top + o) * shape.stride() + left);
    return;
  }
  int top, bottom;
  taken(*plan.y, plan.top, size, top, bottom);
  const size_t stride = buffer_stride(size);
  // Some rows more, of whatever content: their weights are 0.
  Byte* buffer = room(scratch.rows, (size_t(bottom - top) + 4 + plan.y->taps) * stride);
  Byte* line = room(scratch.line, stride);
  SourceRows source(image, shape, plan.box, plan.x->taps, scratch.edge);
  int there = top;
  for (int o = 0; o < size; o++) {
    for (; there < std::min(plan.y->first[plan.top + o] + plan.y->taps, bottom); there += 4) {
      const Byte* rows[4];
      source.four(there, bottom, rows);
      along_x(rows, *plan.x, plan.left, size, buffer + (there - top) * stride);
    }
    along_y(buffer, *plan.y, plan.top + o, top, size, line);
    row(o, line);
  }
}

// The rest: flip, noise, normalisation, erasing.

// A bijection of 32-bit words with small bias (C. Wellons' lowbias32).
inline uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

class Finish {
 public:
  Finish(const Params& view, const Job& job, Scratch& scratch, void* out)
      : view_(view), job_(job), n_(3 * job.size), out_(static_cast<Byte*>(out)) {
    turned_ = room(scratch.turned, n_);
    values_ = room(scratch.values, n_);
    words_ = room(scratch.words, n_);
    if (scratch.scale_shift.size() != 2 * size_t(n_)) {
      scratch.scale_shift.resize(2 * size_t(n_));
      for (int i = 0; i < n_; i++)
        for (int k = 0; k < 2; k++) scratch.scale_shift[k * size_t(n_) + i] = job.normalisation[3 * k + i % 3];
    }
    scale_ = scratch.scale_shift.data(), shift_ = scale_ + n_;
  }

  void row(int y, const Byte* line) {
    if (view_.flip) line = turned(line);
    Byte* to = out_ + size_t(y) * n_ * WIDTHS[job_.kind];
    if (job_.kind == UINT8) {
      std::memcpy(to, line, n_);
      return;
    }
    float* values = job_.kind == FLOAT32 ? reinterpret_cast<float*>(to) : values_;
    if (view_.noise[0])
      normalise(with_noise(y, line), values);
    else
      normalise(line, values);
    if (job_.kind == BFLOAT16) narrow(values, reinterpret_cast<uint16_t*>(to));
    erase(y, to);
  }

 private:
  const Byte* turned(const Byte* line) {
    for (int i = 0, j = n_ - 3; j >= 0; i += 3, j -= 3)
      turned_[i] = line[j], turned_[i + 1] = line[j + 1], turned_[i + 2] = line[j + 2];
    return turned_;
  }

  // Normal noise without its negative half, added.
  const float* with_noise(int y, const Byte* line) {
    const uint32_t first = uint32_t(y) * n_, key = uint32_t(view_.noise[1]), other = uint32_t(view_.noise[2]);
    const float amplitude = as_float(view_.noise[0]);
    for (int i = 0; i < n_; i++) words_[i] = mixed(mixed((first + i) ^ key) + other) >> 16;
    for (int i = 0; i < n_; i++) {
      const float noise = job_.noise_levels[words_[i]] * amplitude, level = float(line[i]) + noise;
      values_[i] = level < 255 ? level : 255;
    }
    return values_;
  }

  template <class Level>
  void normalise(const Level* levels, float* values) {
    const float *__restrict scale = scale_, *__restrict shift = shift_;
    for (int i = 0; i < n_; i++) {
      const float scaled = float(levels[i]) * scale[i];
      values[i] = scaled + shift[i];
    }
  }

  // To the nearest, of two as near the even one.
  void narrow(const float* __restrict values, uint16_t* __restrict out) {
    for (int i = 0; i < n_; i++) {
      uint32_t bits;
      std::memcpy(&bits, values + i, 4);
      out[i] = uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
  }

  void erase(int y, Byte* to) {
    const auto [top, left, height, width] = view_.erase;
    if (y < top || y >= top + height) return;
    const int start = std::min(std::max(left, 0), job_.size), end = std::min(left + width, job_.size);
    const size_t pixel = 3 * size_t(WIDTHS[job_.kind]);
    if (end > start) std::memset(to + start * pixel, 0, (end - start) * pixel);
  }

  const Params& view_;
  const Job& job_;
  int n_;
  Byte* out_;
  Byte* turned_;
  float* values_;
  uint32_t* words_;
  const float *scale_, *shift_;
};

// One view of one image.
void render(const Byte* image, Shape shape, const Params& view, const Job& job, Scratch& scratch, void* out) {
  const int size = job.size;
  const Plan plan = plan_of(view, job, scratch.axes);
  const Byte* source = Chain(image, shape, scratch.images, scratch).run(view.before, BEFORE, read_by(plan, size));
  Finish finish(view, job, scratch, out);
  const bool more = std::any_of(view.after, view.after + AFTER, [](const Operation& one) { return one.code != NONE; });
  if (!more) {
    resize(source, shape, plan, size, scratch, [&](int y, const Byte* line) { finish.row(y, line); });
    return;
  }
  const Shape square{size, size};
  Byte* pixels = room(scratch.squares[0], square.bytes() + PADDING);
  resize(source, shape, plan, size, scratch,
         [&](int y, const Byte* line) { std::memcpy(pixels + y * square.stride(), line, square.stride()); });
  const Byte* made = Chain(pixels, square, scratch.squares, scratch).run(view.after, AFTER, {0, 0, size, size});
  for (int y = 0; y < size; y++) finish.row(y, made + y * square.stride());
}
