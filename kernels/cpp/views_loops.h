// The loops of views.cpp over pixels, included there in a namespace for each kind of processor. Most are left to the
// compiler's vectoriser; where FASTBD_AVX2 is defined, the hottest are written in its instructions.

// Operations on levels.

#ifdef FASTBD_AVX2

inline __m128i load16(const Byte* p) { return _mm_loadu_si128((const __m128i*)p); }

inline __m256i load32(const Byte* p) { return _mm256_loadu_si256((const __m256i*)p); }

inline void store32(Byte* p, __m256i x) { _mm256_storeu_si256((__m256i*)p, x); }

// 16 bytes from each of two places.
inline __m256i two_of_16(const Byte* first, const Byte* second) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(first)), load16(second), 1);
}

inline __m256 floats(const Byte* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

// 32 numbers as bytes, each the nearest one that a byte has.
inline __m256i narrowed(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));  // packs work by halves
}

#endif

// q = other + factor (p - other), clipped and truncated like Pillow's blend.
void blend(const Byte* other, const Byte* p, Byte* q, int n, float factor) {
  int i = 0;
#ifdef FASTBD_AVX2
  const auto eight = [&](int at) {
    const __m256 from = floats(other + at);
    const __m256 x = _mm256_mul_ps(_mm256_sub_ps(floats(p + at), from), _mm256_set1_ps(factor));
    const __m256 least = _mm256_max_ps(_mm256_add_ps(x, from), _mm256_setzero_ps());  // 0 where it is not a number
    return _mm256_cvttps_epi32(_mm256_min_ps(least, _mm256_set1_ps(255)));
  };
  for (; i + 32 <= n; i += 32) store32(q + i, narrowed(eight(i), eight(i + 8), eight(i + 16), eight(i + 24)));
#endif
  for (; i < n; i++) q[i] = clipped(blended(float(other[i]), float(p[i]), factor));
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
    const __m256i pixels = two_of_16(p + 3 * i, p + 3 * i + 12);
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

#ifdef FASTBD_AVX2

// Each byte's entry: of 16 parts of the table, in which the low half of a byte is looked up, its high half chooses.
inline __m256i look_up(const Table& table, __m256i bytes) {
  const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
  __m256i parts[16];
  for (int k = 0; k < 16; k++)
    parts[k] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16(table.data() + 16 * k)), low);
  for (int bit = 4, left = 8; left > 0; bit++, left /= 2) {
    const __m256i on = _mm256_slli_epi16(bytes, 7 - bit);  // the bit is each byte's highest
    for (int k = 0; k < left; k++) parts[k] = _mm256_blendv_epi8(parts[2 * k], parts[2 * k + 1], on);
  }
  return parts[0];
}

// 255 at every third byte, from the first one on.
constexpr Byte THIRDS[] = {255, 0, 0, 255, 0, 0, 255, 0, 0, 255, 0, 0, 255, 0, 0, 255, 0,
                           0, 255, 0, 0, 255, 0, 0, 255, 0, 0, 255, 0, 0, 255, 0, 0, 255};

// Of each place the byte of `first` where a third is, of `second` where the next one is, else of `last`.
inline __m256i chosen(__m256i first, __m256i second, __m256i last, __m256i third, __m256i next) {
  return _mm256_blendv_epi8(_mm256_blendv_epi8(last, second, next), first, third);
}

#endif

// The entries of n pixels, each channel's in its table.
void look_up(const Byte* p, Byte* q, int n, const Channels<Table>& tables) {
  int i = 0;
#ifdef FASTBD_AVX2
  // Of three times 32 bytes those of a channel lie at places that differ, and fill one vector. Choosing twice restores
  // the order.
  const __m256i at0 = load32(THIRDS), at1 = load32(THIRDS + 2), at2 = load32(THIRDS + 1);
  for (; i + 32 <= n; i += 32, p += 96, q += 96) {
    const __m256i a = load32(p), b = load32(p + 32), c = load32(p + 64);
    const __m256i red = look_up(tables[0], chosen(a, b, c, at0, at1));
    const __m256i green = look_up(tables[1], chosen(a, b, c, at1, at2));
    const __m256i blue = look_up(tables[2], chosen(a, b, c, at2, at0));
    store32(q, chosen(red, green, blue, at0, at1));
    store32(q + 32, chosen(red, green, blue, at1, at2));
    store32(q + 64, chosen(red, green, blue, at2, at0));
  }
#endif
  for (; i < n; i++, p += 3, q += 3)
    for (int channel = 0; channel < 3; channel++) q[channel] = tables[channel][p[channel]];
}

// Some pixels' channels, or their hue, saturation and value: 32 bits each, as much as a float, for the vectoriser.
struct Pixels {
  static constexpr int MOST = 64;
  int32_t a[MOST], b[MOST], c[MOST];
};

// From red, green, blue to Pillow's 8-bit hue, saturation, value. Single and double precision in turns, as there.
void to_hsv(Pixels& pixels, int shift) {
  for (int i = 0; i < Pixels::MOST; i++) {
    const int r = pixels.a[i], g = pixels.b[i], b = pixels.c[i], value = std::max(r, std::max(g, b));
    const int spread = value - std::min(r, std::min(g, b));
    // Where grey, dividing by 1 instead of 0 leaves hue and saturation 0, as they must be.
    const float by = float(std::max(spread, 1));
    const float red = float(value - r) / by, green = float(value - g) / by, blue = float(value - b) / by;
    const float if_red = blue - green, if_green = float(2 + double(red) - double(blue));
    const float if_blue = float(4 + double(green) - double(red));
    const float x = r == value ? if_red : g == value ? if_green : if_blue;
    const double turn = double(x) / 6 + 1;
    const double part = double(float(turn - int(turn)));
    pixels.a[i] = (int(part * 255) + shift) & 255;
    pixels.b[i] = int(double(float(spread) / float(std::max(value, 1))) * 255);
    pixels.c[i] = value;
  }
}

// Back to red, green, blue.
void from_hsv(Pixels& pixels) {
  for (int i = 0; i < Pixels::MOST; i++) {
    const int value = pixels.c[i];
    const double sixth = pixels.a[i] * 6.0 / 255, v = value;
    const int sector = int(sixth);
    const double part = double(float(sixth - sector)), s = double(float(pixels.b[i] / 255.0));
    const int low = int((1 - s) * v + 0.5), down = int((1 - s * part) * v + 0.5);
    const int up = int((1 - s * (1 - part)) * v + 0.5);
    // The seventh sector (hue 255) is the first again.
    pixels.a[i] = sector == 1 ? down : sector == 2 || sector == 3 ? low : sector == 4 ? up : value;
    pixels.b[i] = sector == 1 || sector == 2 ? value : sector == 3 ? down : sector == 4 || sector == 5 ? low : up;
    pixels.c[i] = sector == 2 ? up : sector == 3 || sector == 4 ? value : sector == 5 ? down : low;
  }
}

// The hue of n pixels, shifted.
void shift_hue(const Byte* p, Byte* q, int n, int shift) {
  Pixels pixels = {};
  for (int start = 0; start < n; start += Pixels::MOST, p += 3 * Pixels::MOST, q += 3 * Pixels::MOST) {
    const int count = std::min(Pixels::MOST, n - start);
    for (int i = 0; i < count; i++) pixels.a[i] = p[3 * i], pixels.b[i] = p[3 * i + 1], pixels.c[i] = p[3 * i + 2];
    to_hsv(pixels, shift);
    from_hsv(pixels);
    for (int i = 0; i < count; i++)
      q[3 * i] = Byte(pixels.a[i]), q[3 * i + 1] = Byte(pixels.b[i]), q[3 * i + 2] = Byte(pixels.c[i]);
  }
}

// Operations that look at other pixels.

// Whether start + step x leaves int32 for an x of [0, end).
inline bool wraps(uint32_t start, uint32_t step, int end) {
  const int64_t last = int64_t(int32_t(start)) + int64_t(int32_t(step)) * (end - 1);
  return last != int32_t(last);
}

// Each pixel from the nearest one at x' = a x + b y + c and y' likewise, in 16.16 fixed point that wraps around.
void affine(const Byte* p, Byte* q, Shape shape, Region made, const int32_t* args) {
  const uint32_t a = args[0], b = args[1], c = args[2], d = args[3], e = args[4], f = args[5];
  const unsigned width = shape.width, height = shape.height;
  const size_t stride = shape.stride();
  for (int y = made.top; y < made.bottom; y++) {
    const uint32_t row_x = c + b * uint32_t(y), row_y = f + e * uint32_t(y);
    const auto from_x = [&](int x) { return int32_t(row_x + a * uint32_t(x)) >> 16; };
    const auto from_y = [&](int x) { return int32_t(row_y + d * uint32_t(x)) >> 16; };
    const auto inside = [&](int x) { return unsigned(from_x(x)) < width && unsigned(from_y(x)) < height; };
    Byte* to = q + y * stride;
    int left = made.left, right = made.right;
    while (left < right && !inside(left)) left++;
    while (left < right && !inside(right - 1)) right--;
    std::memset(to + 3 * made.left, 0, 3 * size_t(left - made.left));
    std::memset(to + 3 * right, 0, 3 * size_t(made.right - right));
    // Between two places inside all are, unless the numbers wrap around.
    if (wraps(row_x, a, right) || wraps(row_y, d, right)) {
      for (int x = left; x < right; x++)
        if (inside(x))
          std::memcpy(to + 3 * x, p + from_y(x) * stride + 3 * from_x(x), 3);
        else
          std::memset(to + 3 * x, 0, 3);
      continue;
    }
    constexpr int PART = 64;
    uint32_t places[PART];
    for (; left < right; left += PART) {
      const int count = std::min(PART, right - left);
      for (int i = 0; i < count; i++) places[i] = uint32_t(from_y(left + i)) * width + uint32_t(from_x(left + i));
      for (int i = 0; i < count; i++) std::memcpy(to + 3 * (left + i), p + 3 * size_t(places[i]), 3);
    }
  }
}

// Blended with the mean of the pixels around, itself counted five times; at the border with itself.
void sharpen(const Byte* p, Byte* q, Shape shape, Region made, float factor, Scratch& scratch) {
  const int n = int(shape.stride());
  const size_t stride = shape.stride();
  Byte* smooth = room(scratch.others, stride);
  uint16_t* columns = room(scratch.columns, stride);
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

// `box` times the sum of the inner ones of `count` lines and `ends` times that of the two outer ones, over 2^24,
// rounded. COUNT is a number of lines that is compiled in, or 0.
template <int COUNT>
inline void box_sum(const Byte* const* lines, int count, Byte* __restrict q, int n, uint32_t box, uint32_t ends) {
  if (COUNT) count = COUNT;
  const Byte* line[COUNT ? COUNT : 1];
  for (int k = 0; k < COUNT; k++) line[k] = lines[k];
  const Byte* const* from = COUNT ? line : lines;
  for (int i = 0; i < n; i++) {
    uint32_t inner = 0;
    for (int k = 1; k < count - 1; k++) inner += from[k][i];
    const uint32_t outer = uint32_t(from[0][i]) + from[count - 1][i];
    q[i] = Byte((inner * box + outer * ends + (1u << 23)) >> 24);
  }
}

void box_sum(const Byte* const* lines, int count, Byte* q, int n, uint32_t box, uint32_t ends) {
  switch (count) {
    case 3: return box_sum<3>(lines, count, q, n, box, ends);
    case 5: return box_sum<5>(lines, count, q, n, box, ends);
    default: return box_sum<0>(lines, count, q, n, box, ends);
  }
}

// Pillow's GaussianBlur: three box blurs along the rows, then three along the columns. The edge goes on outside.
void blur(const Byte* p, Byte* q, Shape shape, const int32_t* args, Scratch& scratch) {
  const int radius = args[0], count = 2 * radius + 3, n = int(shape.stride());
  const uint32_t box = uint32_t(args[1]), ends = uint32_t(args[2]);
  const size_t stride = shape.stride(), side = 3 * (size_t(radius) + 1);
  const Byte** lines = room(scratch.lines, count);
  Byte* padded = room(scratch.others, stride + 2 * side);
  for (int y = 0; y < shape.height; y++) {
    for (int k = 0; k < count; k++) lines[k] = padded + 3 * size_t(k);
    for (int turn = 0; turn < 3; turn++) {
      const Byte* row = (turn ? q : p) + y * stride;
      for (size_t i = 0; i < side; i++) padded[i] = row[i % 3], padded[side + stride + i] = row[stride - 3 + i % 3];
      std::memcpy(padded + side, row, stride);
      box_sum(lines, count, q + y * stride, n, box, ends);
    }
  }
  Byte* before = room(scratch.before, shape.bytes());
  for (int turn = 0; turn < 3; turn++) {
    std::memcpy(before, q, shape.bytes());
    for (int y = 0; y < shape.height; y++) {
      for (int k = 0; k < count; k++)
        lines[k] = before + std::min(std::max(y + k - radius - 1, 0), shape.height - 1) * stride;
      box_sum(lines, count, q + y * stride, n, box, ends);
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

// Resizing: four rows at once along x into a ring, from which each row of the view is summed along y.

// The last rows that were resized along x, few enough for the nearest cache. With AVX2 every two rows lie there byte by
// byte in turns. A row has some bytes more, for stores that are wider than what is left.
class Ring {
 public:
  Ring(int top, int taps, int size, std::vector<Byte>& memory)
      : top_(top), stride_((3 * size_t(size) + 31) / 32 * 32 + 32) {
    while (rows_ < taps + 4) rows_ *= 2;
    memory_ = room(memory, rows_ * stride_);
  }

  size_t stride() const { return stride_; }
  Byte* at(int row) const { return memory_ + ((row - top_) & (rows_ - 1)) * stride_; }

 private:
  int top_, rows_ = 8;
  size_t stride_;
  Byte* memory_;
};

#ifdef FASTBD_AVX2

// Two weights as one word for all lanes.
inline __m256i two_weights(const int16_t* weights) {
  int32_t both;
  std::memcpy(&both, weights, sizeof both);
  return _mm256_set1_epi32(both);
}

// The window's columns of four rows, which are read up to 16 bytes past the last tap.
void along_x(const Byte* const* rows, const Axis& axis, int start, int size, Byte* out, size_t stride) {
  // Of the five pixels in 16 bytes two as pairs of 16 bits for each channel, then the next two, then the last alone.
  const __m256i near = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
  const __m256i far = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  const __m256i last = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(12, -1, -1, -1, 13, -1, -1, -1, 14, -1, -1, -1, -1, -1, -1, -1));
  // Of the four rows' bytes, in the order 0, 2, 1, 3, two rows in turns.
  const __m128i paired01 = _mm_setr_epi8(0, 8, 1, 9, 2, 10, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m128i paired23 = _mm_setr_epi8(4, 12, 5, 13, 6, 14, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i half = _mm256_set1_epi32(1 << axis.bits >> 1);
  const __m128i shift = _mm_cvtsi32_si128(axis.bits);
  const Byte *const row0 = rows[0], *const row1 = rows[1], *const row2 = rows[2], *const row3 = rows[3];
  const int taps = axis.taps;
  const int* first = axis.first.data() + start;
  const int16_t* weights = axis.weights_of(start);
  Byte* second = out + 2 * stride;
  for (int o = 0; o < size; o++, weights += axis.stride) {
    const size_t from = 3 * size_t(first[o]);
    __m256i sum01 = half, sum23 = half;
    const auto add = [&](__m256i pixels01, __m256i pixels23, __m256i which, const int16_t* two) {
      const __m256i weight = two_weights(two);
      sum01 = _mm256_add_epi32(sum01, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels01, which), weight));
      sum23 = _mm256_add_epi32(sum23, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels23, which), weight));
    };
    for (int k = 0; k < taps; k += 4) {
      const size_t at = from + 3 * size_t(k);
      const __m256i pixels01 = two_of_16(row0 + at, row1 + at), pixels23 = two_of_16(row2 + at, row3 + at);
      add(pixels01, pixels23, near, weights + k);
      if (k + 2 < taps) add(pixels01, pixels23, far, weights + k + 2);
      if (k + 5 == taps) {
        add(pixels01, pixels23, last, weights + k + 4);
        break;
      }
    }
    sum01 = _mm256_sra_epi32(sum01, shift), sum23 = _mm256_sra_epi32(sum23, shift);
    const __m256i words = _mm256_packs_epi32(sum01, sum23);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64((__m128i*)(out + 6 * size_t(o)), _mm_shuffle_epi8(bytes, paired01));
    _mm_storel_epi64((__m128i*)(second + 6 * size_t(o)), _mm_shuffle_epi8(bytes, paired23));
  }
}

// Output `o`, from a row for each of its taps.
void along_y(const Byte* const* rows, const Axis& axis, int o, int size, Byte* line) {
  const int taps = axis.taps;
  const int16_t* weights = axis.weights_of(o);
  const __m256i half = _mm256_set1_epi32(1 << axis.bits >> 1);
  const __m128i shift = _mm_cvtsi32_si128(axis.bits);
  for (int i = 0; i < 3 * size; i += 32) {
    __m256i sums[4] = {half, half, half, half};
    for (int k = 0; k < taps; k += 2) {
      const __m256i weight = two_weights(weights + k);
      const Byte* pair = rows[k] + 2 * i;
      for (int part = 0; part < 4; part++) {
        const __m256i pairs = _mm256_cvtepu8_epi16(load16(pair + 16 * part));
        sums[part] = _mm256_add_epi32(sums[part], _mm256_madd_epi16(pairs, weight));
      }
    }
    for (__m256i& sum : sums) sum = _mm256_sra_epi32(sum, shift);
    store32(line + i, narrowed(sums[0], sums[1], sums[2], sums[3]));
  }
}

#else

inline Byte rounded(int32_t sum, int bits) { return Byte(std::min(std::max(sum >> bits, 0), 255)); }

void along_x(const Byte* const* rows, const Axis& axis, int start, int size, Byte* out, size_t stride) {
  const int taps = axis.taps, bits = axis.bits, half = 1 << bits >> 1;
  for (int r = 0; r < 4; r++, out += stride) {
    const int* first = axis.first.data() + start;
    const int16_t* weights = axis.weights_of(start);
    for (int o = 0; o < size; o++, weights += axis.stride) {
      const Byte* from = rows[r] + 3 * size_t(first[o]);
      int32_t red = half, green = half, blue = half;
      for (int k = 0; k < taps; k++) {
        const int32_t weight = weights[k];
        red += weight * from[3 * k];
        green += weight * from[3 * k + 1];
        blue += weight * from[3 * k + 2];
      }
      out[3 * o] = rounded(red, bits);
      out[3 * o + 1] = rounded(green, bits);
      out[3 * o + 2] = rounded(blue, bits);
    }
  }
}

void along_y(const Byte* const* rows, const Axis& axis, int o, int size, Byte* line) {
  constexpr int PART = 256;
  const int16_t* weights = axis.weights_of(o);
  for (int start = 0; start < 3 * size; start += PART) {
    const int count = std::min(PART, 3 * size - start);
    int32_t sums[PART];
    std::fill(sums, sums + count, 1 << axis.bits >> 1);
    for (int k = 0; k < axis.taps; k++) {
      const Byte* from = rows[k] + start;
      const int16_t weight = weights[k];
      int16_t levels[PART];  // for multiplication of 16 bits by 16
      for (int i = 0; i < count; i++) levels[i] = from[i];
      for (int i = 0; i < count; i++) sums[i] += weight * levels[i];
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
      // The next four are on their way while these are worked on.
      for (size_t ahead = 0; ahead < width; ahead += 64) __builtin_prefetch(rows[r] + 4 * shape_.stride() + ahead);
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
  const int taps = plan.y->taps;
  const Ring ring(top, taps, size, scratch.rows);
  const Byte** lines = room(scratch.lines, taps);
  Byte* made = room(scratch.line, ring.stride());
  SourceRows source(image, shape, plan.box, plan.x->taps, scratch.edge);
  int there = top;
  for (int o = 0; o < size; o++) {
    const int first = plan.y->first[plan.top + o];
    for (; there < std::min(first + taps, bottom); there += 4) {
      const Byte* rows[4];
      source.four(there, bottom, rows);
      along_x(rows, *plan.x, plan.left, size, ring.at(there), ring.stride());
    }
    for (int k = 0; k < taps; k++) lines[k] = ring.at(first + k);
    along_y(lines, *plan.y, plan.top + o, size, made);
    row(o, made);
  }
}

// The rest: flip, noise, normalisation, erasing.

// A bijection of 32-bit words with small bias (C. Wellons' lowbias32).
inline uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

// A row to the view. With AVX2 past the caches, which are smaller than a batch: a store into them would read first what
// it replaces.
void write(Byte* to, const void* row, size_t bytes) {
  size_t done = 0;
#ifdef FASTBD_AVX2
  if (uintptr_t(to) % 32 == 0)
    for (; done + 32 <= bytes; done += 32) {
      const Byte* from = static_cast<const Byte*>(row) + done;
      _mm256_stream_si256((__m256i*)(to + done), _mm256_loadu_si256((const __m256i*)from));
    }
#endif
  std::memcpy(to + done, static_cast<const Byte*>(row) + done, bytes - done);
}

// What follows the square of pixels, row by row, into the view.
class Finish {
 public:
  Finish(const Params& view, const Job& job, Scratch& scratch, void* out)
      : view_(view), job_(job), n_(3 * job.size), out_(static_cast<Byte*>(out)) {
    turned_ = room(scratch.turned, n_);
    values_ = room(scratch.values, n_);
    narrowed_ = room(scratch.narrowed, n_);
    words_ = room(scratch.words, n_);
    scale_ = job.normalisation, shift_ = scale_ + n_;
  }

  void row(int y, const Byte* line) {
    if (view_.flip) line = turned(line);
    const size_t bytes = size_t(n_) * WIDTHS[job_.kind];
    Byte* to = out_ + y * bytes;
    if (job_.kind == UINT8) {
      write(to, line, bytes);
      return;
    }
    if (view_.noise[0])
      normalise(with_noise(y, line));
    else
      normalise(line);
    if (y >= view_.erase[0] && y < view_.erase[0] + view_.erase[2]) erase();
    if (job_.kind == BFLOAT16) {
      narrow(values_, narrowed_);
      write(to, narrowed_, bytes);
    } else {
      write(to, values_, bytes);
    }
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
    const float* levels = job_.noise_levels;
    const int n = n_;
    for (int i = 0; i < n; i++) words_[i] = mixed(mixed((first + i) ^ key) + other) >> 16;
    for (int i = 0; i < n; i++) {
      const float noise = levels[words_[i]] * amplitude, level = float(line[i]) + noise;
      values_[i] = level < 255 ? level : 255;
    }
    return values_;
  }

  template <class Level>
  void normalise(const Level* levels) {
    const float *scale = scale_, *shift = shift_;
    float* values = values_;
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

  void erase() {
    const int start = std::max(view_.erase[1], 0), end = std::min(view_.erase[1] + view_.erase[3], job_.size);
    std::fill(values_ + 3 * start, values_ + 3 * std::max(start, end), 0.0f);
  }

  const Params& view_;
  const Job& job_;
  int n_;
  Byte* out_;
  Byte* turned_;
  float* values_;
  uint16_t* narrowed_;
  uint32_t* words_;
  const float *scale_, *shift_;
};

// One view of one image.
void render(const Byte* image, Shape shape, const Params& view, const Job& job, Scratch& scratch, void* out) {
  const int size = job.size;
  const Plan plan = plan_of(view, job, scratch.axes);
  const Byte* source = Chain(image, shape, scratch.images, scratch).run(view.before, BEFORE, read_by(plan, size));
  Finish finish(view, job, scratch, out);
  if (!std::any_of(view.after, view.after + AFTER, [](const Operation& one) { return one.code != NONE; })) {
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
