// One step of one array by Adam, or a rule of its kin, in one pass over memory. The rules are those of ../_transforms,
// the formats are those
// of ../_transforms/moment_storage.py, ../_core/low_precision.py, ../_core/quantization.py and ../rounding.py;
// _backend.py makes the operands. Where a step has a factor of a whole array, a pass that only reads sums what it is made of
// before.
//
// Arithmetic is in float32. Tiles of all arrays are converted to float32 in the cache, stepped there, and written back.
// So each format needs one loop that loads and one that stores, independent of the formats of other arrays.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kTile = 1024;  // numbers of each array per tile: whole blocks of codes
constexpr int64_t kAhead = 512, kFarAhead = 1024;  // prefetch distances, in numbers: of steps in float32, and of others
constexpr int64_t kLeast = 16;   // minimum of tiles that a thread takes at a time
constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr float kNarrowing = 0.25f;  // of the dither of ratios, by 1 - b1; see ../_transforms/moment_storage.py

// One row of the first operand.
struct Scalars {
  float keep1, a1, undo1;      // m <- keep1 m + a1 (g - undo1 m)
  float of_m, of_g;            // numerator: of_m m + of_g g, with bias corrections and the learning rate
  float keep2, a2, undo2;      // v <- keep2 v + a2 (g^2 - undo2 v)
  float by_c2, eps_root, eps;  // denominator: sqrt(v by_c2 + eps_root) + eps
  float limit;                 // of a finite gradient as it is given
  float sign, coupled;         // g <- sign g + coupled p; the sign has the factor of clipping, too
  float decay;                 // p <- p + m / v + decay p
  float cautious;              // -1 for no decay where that opposes m / v, else 1
  float kept_by_c2;            // factor of v before the maximum; 1 unless the maximum is of corrected moments
  float largest;               // of a finite gradient with decay in it, so that its square is finite
  float keep3, a3, undo3;      // AdEMAMix: slow <- keep3 slow + a3 (g - undo3 slow)
  float of_slow;               // AdEMAMix: numerator: + of_slow slow
  float agreeing;              // cautious: the sign of the learning rate, with which m agrees with g
  float angle, of_root;        // atan2: angle atan2(numerator, of_root denominator)
  float most;                  // ADOPT: of a gradient over the root
  float pull, push, rate;      // schedule-free: p <- p + pull (z - p) - push d, z <- z - rate d
};
constexpr int64_t kScalars = sizeof(Scalars) / sizeof(float);

struct Dither {
  uint32_t seed, turn;

  Dither ThirdArray() const;  // with hashes of its own; see ../_core/low_precision.py
};

// One row of the second operand, before the offsets.
struct Dithers {
  Dither moments, parameter;
};
constexpr int64_t kDithers = sizeof(Dithers) / sizeof(uint32_t);

// The rule of a step: Adam's, or another that differs in what `Form` says.
enum class Rule { kAdam, kCautious, kAdEMAMix, kADOPT, kAtan2, kScheduleFree };

// The rounding of a half precision parameter: the update is rounded and added, or a wrapper of ../rounding.py applies.
enum class Landing { kNone, kStochastic, kCompensated, kMaster, kLowBits };

// `n` numbers of a row, starting at `column`.
struct Span {
  int64_t row, column, n;
};

uint32_t Bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float Number(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Array;

// The operations of a format. Random rounding is unbiased.
struct Format {
  void (*load)(const Array&, const Span&, float*);
  void (*load_mean)(const Array&, const Span&, const float* square, float*);  // of ratios to its root, instead of `load`
  void (*store_nearest)(const Array&, const Span&, const float*);
  void (*store_random)(const Array&, const Span&, const float*, const uint32_t*);
  void (*store_mean)(const Array&, const Span&, const float*, const uint32_t*, float narrowing);
  void (*store_square)(const Array&, const Span&, const float*, const uint32_t*);
  void (*store_maximum)(const Array&, const Span&, const float*);
};

struct Array {
  const Format* format = nullptr;  // null for float32, which is used in place
  int64_t bits = 32;               // per number
  const char* in = nullptr;
  char* out = nullptr;
  int64_t stride = 0;                // bytes of a row
  const uint16_t* scales_in = nullptr;  // of codes, one per block
  uint16_t* scales_out = nullptr;
  int64_t block = 0, blocks = 0;  // numbers per block, and blocks per row
  int64_t ahead = kAhead;

  int64_t At(const Span& s) const { return s.row * stride + Bytes(s.column); }
  int64_t Bytes(int64_t n) const { return (n * bits + 7) / 8; }
  const char* Ahead(const Span& s) const { return in + At(s) + Bytes(ahead); }
  int64_t Scale(const Span& s) const { return s.row * blocks + s.column / block; }

  template <class T>
  const T* In(const Span& s) const {
    return reinterpret_cast<const T*>(in + At(s));
  }
  template <class T>
  T* Out(const Span& s) const {
    return reinterpret_cast<T*>(out + At(s));
  }

  bool IsNarrow() const { return format != nullptr && block == 0; }  // half precision, not codes

  // Reload half precision numbers as they were stored.
  void Settle(const Span& s, float* numbers) const {
    if (!IsNarrow()) return;
    Array stored = *this;
    stored.in = out;
    format->load(stored, s, numbers);
  }

  // Load the numbers as float32: into `buffer`, or in place for float32 arrays, whose results go to the same place.
  float* Bring(const Span& s, float* buffer) const {
    if (format != nullptr) {
      format->load(*this, s, buffer);
      return buffer;
    }
    if (out != nullptr && out != in) std::memcpy(out + At(s), in + At(s), s.n * 4);
    return reinterpret_cast<float*>((out != nullptr ? out : const_cast<char*>(in)) + At(s));
  }

  // The same of first moments, whose codes are of their ratios to the root of the second.
  float* BringMean(const Span& s, const float* square, float* buffer) const {
    if (block == 0) return Bring(s, buffer);
    format->load_mean(*this, s, square, buffer);
    return buffer;
  }
};

// Vectors, for loops that compilers do not vectorise by themselves.

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Pairs __attribute__((vector_size(4 * kLanes)));  // of words
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Integers __attribute__((vector_size(kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint8_t HalfBytes __attribute__((vector_size(kLanes / 2)));

template <class V>
V Lanes(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return x;
}

// The first `n` numbers; 0 in other lanes.
Floats Some(const float* from, int64_t n) {
  if (n >= kLanes) return Lanes<Floats>(from);
  Floats x{};
  std::memcpy(&x, from, 4 * n);
  return x;
}

// The same numbers, with zeros after them that fill the last vector.
const float* Padded(const float* x, int64_t n, float* copy) {
  if (n % kLanes == 0) return x;
  std::memcpy(copy, x, 4 * n);
  std::memset(copy + n, 0, 4 * kLanes);
  return copy;
}

template <class V>
void Put(void* to, V x) {
  std::memcpy(to, &x, sizeof(V));
}

template <class T>
T Max(T x, T y) {
  return x > y ? x : y;
}

template <class T>
T Min(T x, T y) {
  return x < y ? x : y;
}

// NaN stays NaN, as in jnp.maximum.
template <class T>
T MaxOrNaN(T x, T y) {
  return (x > y) | (x != x) ? x : y;
}

float Abs(float x) { return std::fabs(x); }
Floats Abs(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Words>(x) & 0x7FFFFFFF); }

float Root(float x) { return std::sqrt(x); }
float TwiceInverseRoot(float x) { return x > 0 ? 2 / std::sqrt(x) : 0; }

// Infinity and NaN stay what they are.
float Limited(float x, float largest) {
  return std::fabs(x) > largest && std::fabs(x) < INFINITY ? std::copysign(largest, x) : x;
}
Floats Limited(Floats x, float largest) {
  Words bits = reinterpret_cast<Words>(x), size = bits & 0x7FFFFFFF;
  Words limited = Bits(largest) | (bits & 0x80000000);
  return reinterpret_cast<Floats>((size > Bits(largest)) & (size < 0x7F800000) ? limited : bits);
}

// Where `cautious` is negative, 0 in place of a decay whose sign is not that of the update. Of a product that is 0, the
// sum with 0 is positive.
float Agreeing(float decay, float update, float cautious) {
  return cautious < 0 && decay * update < 0 ? 0 : decay;
}
Floats Agreeing(Floats decay, Floats update, float cautious) {
  Words product = reinterpret_cast<Words>(decay * update + 0.0f);
  Words opposed = reinterpret_cast<Words>(reinterpret_cast<Ints>(product & Bits(cautious)) >> 31);
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(decay) & ~opposed);
}

#if defined(__AVX512F__)
Words Max(Words x, Words y) { return (Words)_mm512_max_epu32((__m512i)x, (__m512i)y); }
Ints Max(Ints x, Ints y) { return (Ints)_mm512_max_epi32((__m512i)x, (__m512i)y); }
Words Min(Words x, Words y) { return (Words)_mm512_min_epu32((__m512i)x, (__m512i)y); }
Ints Min(Ints x, Ints y) { return (Ints)_mm512_min_epi32((__m512i)x, (__m512i)y); }
Floats Max(Floats x, Floats y) { return _mm512_max_ps(x, y); }
Floats Min(Floats x, Floats y) { return _mm512_min_ps(x, y); }
uint32_t Largest(Words x) { return _mm512_reduce_max_epu32((__m512i)x); }
Floats Root(Floats x) { return _mm512_sqrt_ps(x); }
// A square root with four digits, of a number above 0, plus another number.
Floats RootPlus(Floats x, float y) { return x * _mm512_rsqrt14_ps(x) + y; }
// Two over the square root, or 0 where there is none: an estimate, and a step of Newton's method.
Floats TwiceInverseRoot(Floats x) {
  Floats y = _mm512_maskz_rsqrt14_ps(_mm512_cmp_ps_mask(x, Floats{}, _CMP_GT_OQ), x);
  return y * (3 - x * y * y);
}
#else
#if defined(__AVX2__)
Words Max(Words x, Words y) { return (Words)_mm256_max_epu32((__m256i)x, (__m256i)y); }
Ints Max(Ints x, Ints y) { return (Ints)_mm256_max_epi32((__m256i)x, (__m256i)y); }
Words Min(Words x, Words y) { return (Words)_mm256_min_epu32((__m256i)x, (__m256i)y); }
Ints Min(Ints x, Ints y) { return (Ints)_mm256_min_epi32((__m256i)x, (__m256i)y); }
Floats Max(Floats x, Floats y) { return _mm256_max_ps(x, y); }
Floats Min(Floats x, Floats y) { return _mm256_min_ps(x, y); }
Floats Root(Floats x) { return _mm256_sqrt_ps(x); }
#else
#if defined(__SSE__)
Floats Root(Floats x) { return _mm_sqrt_ps(x); }
#else
Floats Root(Floats x) {
  for (int64_t i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
#endif
#endif
Floats RootPlus(Floats x, float y) { return Root(x) + y; }
Floats TwiceInverseRoot(Floats x) { return x > 0 ? 2 / Root(x) : Floats{}; }
uint32_t Largest(Words x) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < kLanes; ++i) largest = std::max(largest, x[i]);
  return largest;
}
#endif

// Conversions of integers. GCC makes several instructions of the general ones.
template <class W, class N>
W Widened(N x) {
  return __builtin_convertvector(x, W);
}
template <class N, class W>
N Narrowed(W x) {
  return __builtin_convertvector(x, N);
}
#if defined(__AVX512F__)
template <>
Words Widened(Halves x) { return (Words)_mm512_cvtepu16_epi32((__m256i)x); }
template <>
Ints Widened(Integers x) { return (Ints)_mm512_cvtepi8_epi32((__m128i)x); }
template <>
Ints Widened(Bytes x) { return (Ints)_mm512_cvtepu8_epi32((__m128i)x); }
template <>
Pairs Widened(HalfBytes x) { return (Pairs)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)&x)); }
template <>
Halves Narrowed(Words x) { return (Halves)_mm512_cvtepi32_epi16((__m512i)x); }
template <>
Integers Narrowed(Ints x) { return (Integers)_mm512_cvtepi32_epi8((__m512i)x); }
template <>
Bytes Narrowed(Ints x) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)x); }
template <>
HalfBytes Narrowed(Pairs x) { return (HalfBytes)_mm_cvtsi128_si64(_mm512_cvtepi64_epi8((__m512i)x)); }
#elif defined(__AVX2__)
template <>
Ints Widened(Integers x) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)&x)); }
template <>
Ints Widened(Bytes x) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&x)); }
// Integers that 16 bits hold.
__m128i Packed(Ints x) { return _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1)); }
template <>
Integers Narrowed(Ints x) { return (Integers)_mm_cvtsi128_si64(_mm_packs_epi16(Packed(x), __m128i{})); }
template <>
Bytes Narrowed(Ints x) { return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(Packed(x), __m128i{})); }
#endif

Words WidenedHalves(const uint16_t* from) { return Widened<Words>(Lanes<Halves>(from)); }
void PutHalves(uint16_t* to, Words x) { Put(to, Narrowed<Halves>(x)); }

template <class T>
T Hash(T x) {
  x *= 0x7FEB352Du;
  return (x ^ (x >> 15)) * 0x846CA68Bu;
}

Dither Dither::ThirdArray() const { return {Hash(seed + 1), turn}; }

// Random numbers by global index; see ../_core/low_precision.py.
__attribute__((always_inline)) inline Words Random(uint32_t first, const Dither& d) {
  constexpr uint32_t kCount[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return Hash((Lanes<Words>(kCount) + first) ^ d.seed) + d.turn;
}

// Half precision: floats of 16 bits. `Nearest` (ties to even) and `Cut` (stochastic rounding) return float32 numbers that
// `Put` stores exactly.

struct BFloat16 {
  static Floats Load(const uint16_t* from) { return reinterpret_cast<Floats>(WidenedHalves(from) << 16); }
  static void Put(uint16_t* to, Floats x) { PutHalves(to, reinterpret_cast<Words>(x) >> 16); }
  static Floats Nearest(Floats x) {  // NaN stays NaN
    Words b = reinterpret_cast<Words>(x);
    return reinterpret_cast<Floats>(x == x ? b + 0x7FFF + ((b >> 16) & 1) : b | 0x400000);
  }
  // Bits whose upper half is the rounded number.
  static Words CutBits(Floats x, Words random) {
    Words bits = reinterpret_cast<Words>(x);
    return x == x ? bits + (random >> 16) : bits | 0x400000;
  }
  static Floats Cut(Floats x, Words random) { return reinterpret_cast<Floats>(CutBits(x, random) & 0xFFFF0000); }
  static Floats Saturated(Floats x) { return x; }
  static Floats Settled(Floats, Floats rounded) { return rounded; }
  static Floats Positive(Floats, Floats rounded) { return rounded; }  // unchanged: subnormals are flushed here
};

struct Float16 {
#if defined(__AVX512F__)
  static Floats Load(const uint16_t* from) { return _mm512_cvtph_ps(Lanes<__m256i>(from)); }
  static void Put(uint16_t* to, Floats x) { ::Put(to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__AVX2__) && defined(__F16C__)
  static Floats Load(const uint16_t* from) { return _mm256_cvtph_ps(Lanes<__m128i>(from)); }
  static void Put(uint16_t* to, Floats x) { ::Put(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
  static Floats Load(const uint16_t* from) {
    Words half = WidenedHalves(from), size = half & 0x7FFF;
    Words normal = (size << 13) + (size < 0x7C00 ? (112u << 23) + Words{} : (224u << 23) + Words{});
    Words small = reinterpret_cast<Words>(__builtin_convertvector(reinterpret_cast<Ints>(size), Floats) * 0x1p-24f);
    return reinterpret_cast<Floats>((size < 0x400 ? small : normal) | (half & 0x8000) << 16);
  }
  static void Put(uint16_t* to, Floats x) {
    Words bits = reinterpret_cast<Words>(x), size = bits & 0x7FFFFFFF;
    Words normal = Min(((size + 0xFFF + ((size >> 13) & 1)) >> 13) - (112u << 10), 0x7C00 + Words{});
    Words small = reinterpret_cast<Words>(reinterpret_cast<Floats>(size) * 0x1p24f + 0x1p23f) - 0x4B000000;
    Words half = size < 0x38800000 ? small : size > 0x7F800000 ? 0x7E00 + Words{} : normal;
    PutHalves(to, half | (bits >> 16 & 0x8000));
  }
#endif
  static Floats Nearest(Floats x) { return x; }
  static Floats Cut(Floats x, Words random) {
    Floats y = x * 0x1p24f + __builtin_convertvector(reinterpret_cast<Ints>(random >> 9), Floats) * 0x1p-23f;
    Floats whole = __builtin_convertvector(__builtin_convertvector(y, Ints), Floats);
    Words subnormal = reinterpret_cast<Words>((whole > y ? whole - 1 : whole) * 0x1p-24f);
    Words bits = reinterpret_cast<Words>(x), normal = (bits + (random >> 19)) & 0xFFFFE000;
    Words rounded = (bits & 0x7FFFFFFF) < 0x38800000 ? subnormal : normal;
    return reinterpret_cast<Floats>(x != x ? bits : rounded);
  }
  static Floats Saturated(Floats x) { return Limited(x, 65504.0f); }
  // Its smallest number is no small first moment.
  static Floats Settled(Floats x, Floats rounded) {
    return (reinterpret_cast<Words>(x) & 0x7FFFFFFF) < 0x33000000 ? Floats{} : rounded;
  }
  static Floats Positive(Floats x, Floats rounded) {
    return (x > 0) & (rounded < 0x1p-24f) ? 0x1p-24f + Floats{} : rounded;
  }
};

template <class T>
void Load(const Array& a, const Span& s, float* to) {
  const uint16_t* from = a.In<uint16_t>(s);
  int64_t i = 0;
  for (; i + kLanes <= s.n; i += kLanes) Put(to + i, T::Load(from + i));
  if (i == s.n) return;
  uint16_t last[kLanes] = {};
  std::memcpy(last, from + i, 2 * (s.n - i));
  Put(to + i, T::Load(last));
}

// `rounded` is called with the place of a vector, and its numbers.
template <class T, class F>
void Store(const Array& a, const Span& s, const float* x, F rounded) {
  uint16_t* to = a.Out<uint16_t>(s);
  int64_t i = 0;
  for (; i + kLanes <= s.n; i += kLanes) T::Put(to + i, rounded(i, Lanes<Floats>(x + i)));
  if (i == s.n) return;
  uint16_t last[kLanes];
  T::Put(last, rounded(i, Some(x + i, s.n - i)));
  std::memcpy(to + i, last, 2 * (s.n - i));
}

template <class T>
void StoreNearest(const Array& a, const Span& s, const float* x) {
  Store<T>(a, s, x, [](int64_t, Floats x) { return T::Nearest(x); });
}

template <class T>
void StoreRandom(const Array& a, const Span& s, const float* x, const uint32_t* random) {
  Store<T>(a, s, x, [=](int64_t i, Floats x) { return T::Cut(x, Lanes<Words>(random + i)); });
}

template <class T>
Floats RoundedMean(Floats x, Words random) {
  return T::Settled(x, T::Cut(T::Saturated(x), random));
}

template <class T>
Floats RoundedSquare(Floats x, Words random) {
  return T::Positive(x, T::Cut(T::Saturated(x), random << 9));
}

template <class T>
void StoreMean(const Array& a, const Span& s, const float* x, const uint32_t* random, float) {
  Store<T>(a, s, x, [=](int64_t i, Floats x) { return RoundedMean<T>(x, Lanes<Words>(random + i)); });
}

template <class T>
void StoreSquare(const Array& a, const Span& s, const float* x, const uint32_t* random) {
  Store<T>(a, s, x, [=](int64_t i, Floats x) { return RoundedSquare<T>(x, Lanes<Words>(random + i)); });
}

template <class T>
void StoreMaximum(const Array& a, const Span& s, const float* x) {
  Store<T>(a, s, x, [](int64_t, Floats x) { return T::Positive(x, T::Nearest(T::Saturated(x))); });
}

template <class T>
constexpr Format kFloat{Load<T>, nullptr, StoreNearest<T>, StoreRandom<T>, StoreMean<T>, StoreSquare<T>, StoreMaximum<T>};

// Codes: see ../_core/quantization.py. A format has two parameters for each block, which follow from its scale, and its
// scale follows from the maxima of one or two keys of its numbers. All are of vectors: of several blocks, or of one.

constexpr uint32_t kLargest = 0x7F7FFFFF, kInfinity = 0x7F800000, kNaNs = 0x7FFFFFFF;  // bits of float32 numbers

Words Magnitude(Floats x) { return reinterpret_cast<Words>(x) & 0x7FFFFFFF; }

// First moments: ratios to the root of the second one. An integer q encodes q (|q| + 2 levels) units.
template <int kNumberBits>
struct Ratios {
  static constexpr int kBits = kNumberBits;
  static constexpr int kLevels = kBits == 8 ? 127 : 7;
  static constexpr int kShift = kBits == 8 ? 0 : 8;  // of q in its four bits
  static constexpr float kTop = kLevels, kTwice = 2 * kLevels, kUnits = 3 * kLevels * kLevels;  // `kUnits` of a scale
  using Stored = Integers;

  static constexpr int kKeys = 1;
  static Words Key(int, Floats x) { return Magnitude(x); }

  static Words Scale(const Words* maxima) {  // NaN for a block with a number that is not finite
    const Words largest = maxima[0];
    return largest < kInfinity ? Min(largest + 0xFFFF, kLargest + Words{}) >> 16 : 0x7FC0 + Words{};
  }

  struct Block {
    Floats unit, per_unit;

    static Block Of(Words scale) {
      Floats s = reinterpret_cast<Floats>(scale << 16);
      return {s * (1 / kUnits), s == 0 ? Floats{} : kUnits * (1 - 0x1p-22f) / s};  // the largest is at most `levels`
    }
  };

  static Floats Decode(Ints codes, const Block& block) {
    Floats q = __builtin_convertvector(codes, Floats);
    Floats size = reinterpret_cast<Floats>(Magnitude(q));
    return q * (size + kTwice) * block.unit;
  }

  // With t = |q| + levels, |q| (|q| + 2 levels) units are t^2 - levels^2. A number is rounded up if it is above the middle
  // of its cell by more than the dither, in (-1/2, 1/2) of the width. Its root need not be exact: if an error puts a
  // number that is very close to a code on the wrong side of it, the number always becomes that code, instead of almost
  // always. The sign of the errors changes every 1e-4, so nothing gets stuck.
  static Ints Encode(Floats x, const Block& block, Words random, float narrowing) {
    constexpr float kWhole = 0x1p23f;  // numbers above are integers, which are in their last bits
    constexpr float kFull = 0x1p-32f * (1 - 0x1p-18f);
    constexpr int32_t kZero = 0x4B000000 + kLevels;  // the bits of kWhole + kTop
    Floats square = reinterpret_cast<Floats>(Magnitude(x)) * block.per_unit + kTop * kTop;
    Ints whole = Max(reinterpret_cast<Ints>(RootPlus(square, kWhole - 0.5f)), kZero + Ints{});
    Floats low = reinterpret_cast<Floats>(whole) - kWhole, next = low + 1;
    Floats width = Max(kFull / 2 + Floats{}, kFull * (1 + kTop * narrowing) - kFull * narrowing * low);
    width = low < 2 * kTop - 1 ? width : kFull + Floats{};
    Floats centred = __builtin_convertvector(reinterpret_cast<Ints>(random ^ 0x80000000), Floats);
    Floats threshold = width * (low + next) * centred + 0.5f;
    Ints q = whole - kZero;
    q = square - low * next > threshold ? q + 1 : q;
    return reinterpret_cast<Ints>(x) < 0 ? -q : q;
  }
};

// Second moments: float32 numbers without their last bits, counted from the smallest one of a block.
template <int kNumberBits>
struct Squares {
  static constexpr int kBits = kNumberBits;
  static constexpr int kLevels = kBits == 8 ? 255 : 15;
  static constexpr int kShift = 0;
  static constexpr int32_t kLeastShift = 10, kMostShift = 25;
  using Stored = Bytes;

  // The largest, and the smallest without 0: subnormal numbers are flushed to 0.
  static constexpr int kKeys = 2;
  static Words Key(int i, Floats x) { return i == 0 ? Magnitude(x) : -Magnitude(x); }

  static Words Scale(const Words* maxima) {
    constexpr int32_t kRange = kLevels - 2;  // rounding may add one to the largest
    const Ints largest = reinterpret_cast<Ints>(maxima[0]), smallest = reinterpret_cast<Ints>(-maxima[1]), one = 1 + Ints{};
    const Ints from = Min(smallest, largest) & -(1 << 19);
    const Ints length = (reinterpret_cast<Ints>(__builtin_convertvector(largest - from, Floats)) >> 23) - 126;
    Ints shift = Min(Max(length - kBits, kLeastShift * one), kMostShift * one);
    shift = (largest >> shift) - (from >> shift) > kRange ? Min(shift + 1, kMostShift * one) : shift;
    const Ints least = Max((largest >> shift) - kRange, one) << shift;  // not 0
    const Ints scale = (Max(from, least) >> 19) << 4 | (shift - kLeastShift);
    return maxima[0] < kInfinity ? reinterpret_cast<Words>(scale) : (kNaNs >> 19 << 4) + Words{};
  }

  struct Block {
    Ints before, shift;  // the number before the first one, and the count of the bits without which it is an integer

    static Block Of(Words scale) {
      Ints shift = reinterpret_cast<Ints>(scale & 15) + kLeastShift;
      return {(reinterpret_cast<Ints>(scale >> 4 << 19) >> shift) - 1, shift};
    }
    Floats Lowest() const { return reinterpret_cast<Floats>((before + 1) << shift); }
  };

  static Floats Decode(Ints q, const Block& block) {
    Floats x = reinterpret_cast<Floats>((block.before + q) << block.shift);
    return q == 0 ? Floats{} : x;
  }

  static Ints Encode(Floats x, const Block& block, Words random) {
    Words bits = Magnitude(x), rounded = bits + (random >> reinterpret_cast<Words>(32 - block.shift));
    Ints q = reinterpret_cast<Ints>(Min(rounded, kLargest + Words{})) >> block.shift;
    q = Min(Max(q - block.before, 1 + Ints{}), kLevels + Ints{});
    return bits == 0 ? Ints{} : q;
  }
};

// The integers of a vector of codes. In four bits there are two per byte, the first in the lower half.
template <class C>
Ints Codes(const uint8_t* from) {
  if constexpr (C::kBits == 8) return Widened<Ints>(Lanes<typename C::Stored>(from));
  Pairs pairs = Widened<Pairs>(Lanes<HalfBytes>(from));
  return reinterpret_cast<Ints>((pairs | pairs << 28) & 0x0000000F0000000F) - C::kShift;
}

template <class C>
void PutCodes(uint8_t* to, Ints q) {
  if constexpr (C::kBits == 8) return Put(to, Narrowed<typename C::Stored>(q));
  Pairs pairs = reinterpret_cast<Pairs>(q + C::kShift);
  Put(to, Narrowed<HalfBytes>(pairs | pairs >> 28));
}

// The parameters of the blocks of a span.
template <class C>
class Blocks {
 public:
  // From scales, which are widened in `scales`.
  Blocks(int64_t count, const uint32_t* scales) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const typename C::Block some = C::Block::Of(Lanes<Words>(scales + i));
      std::memcpy(first_ + i, &some, sizeof(Words));
      std::memcpy(second_ + i, reinterpret_cast<const char*>(&some) + sizeof(Words), sizeof(Words));
    }
  }

  // Call `task` with the place of each vector and the parameters of each of its lanes.
  template <class F>
  void ForEach(int64_t n, int64_t size, F task) const {
    if (size < kLanes) {
      for (int64_t i = 0; i < n; i += kLanes) {
        uint32_t each[2][kLanes];
        for (int64_t j = 0; j < kLanes; ++j) each[0][j] = first_[(i + j) / size], each[1][j] = second_[(i + j) / size];
        task(i, Lanes<typename C::Block>(each));
      }
      return;
    }
    for (int64_t begin = 0, j = 0; begin < n; begin += size, ++j) {
      const Words both[] = {first_[j] + Words{}, second_[j] + Words{}};
      const typename C::Block block = Lanes<typename C::Block>(both);
      for (int64_t i = begin; i < std::min(n, begin + size); i += kLanes) task(i, block);
    }
  }

 private:
  alignas(64) uint32_t first_[kTile + kLanes], second_[kTile + kLanes];
};

// `put` is called with the place of each vector, and its numbers.
template <class C, class F>
void LoadCodes(const Array& a, const Span& s, F put) {
  uint8_t copy[kTile + kLanes];
  const uint8_t* codes = a.In<uint8_t>(s);
  if (s.n % kLanes != 0) {
    std::memcpy(copy, codes, a.Bytes(s.n));
    codes = copy;
  }
  alignas(64) uint32_t scales[kTile + kLanes];
  const int64_t count = (s.n + a.block - 1) / a.block;
  for (int64_t i = 0; i < count; ++i) scales[i] = a.scales_in[a.Scale(s) + i];
  Blocks<C>(count, scales).ForEach(s.n, a.block, [=](int64_t i, const typename C::Block& block) {
    put(i, C::Decode(Codes<C>(codes + i * C::kBits / 8), block));
  });
}

template <int kBits>
void LoadSquares(const Array& a, const Span& s, float* to) {
  LoadCodes<Squares<kBits>>(a, s, [=](int64_t i, Floats x) { Put(to + i, x); });
}

template <int kBits>
void LoadRatios(const Array& a, const Span& s, const float* square, float* to) {
  alignas(64) float copy[kTile + kLanes];
  square = Padded(square, s.n, copy);
  LoadCodes<Ratios<kBits>>(a, s, [=](int64_t i, Floats x) { Put(to + i, x * Root(Lanes<Floats>(square + i))); });
}

// `encode` is called with a vector of numbers, the parameters of its blocks, and its place.
template <class C, class F>
void StoreCodes(const Array& a, const Span& s, const float* x, F encode) {
  alignas(64) float padded[kTile + kLanes];
  x = Padded(x, s.n, padded);
  alignas(64) uint32_t maxima[C::kKeys][kTile + kLanes], scales[kTile + kLanes];
  const int64_t count = (s.n + a.block - 1) / a.block;
  for (int64_t begin = 0, j = 0; begin < s.n; begin += a.block, ++j) {
    const int64_t end = std::min(s.n, begin + a.block);
    Words largest[C::kKeys]{};
    for (int64_t i = begin; i < end; i += kLanes) {
      const Floats some = a.block < kLanes ? Some(x + i, end - i) : Lanes<Floats>(x + i);
      for (int k = 0; k < C::kKeys; ++k) largest[k] = Max(largest[k], C::Key(k, some));
    }
    for (int k = 0; k < C::kKeys; ++k) maxima[k][j] = Largest(largest[k]);
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    Words some[C::kKeys];
    for (int k = 0; k < C::kKeys; ++k) some[k] = Lanes<Words>(maxima[k] + i);
    Put(scales + i, C::Scale(some));
  }
  for (int64_t i = 0; i < count; ++i) a.scales_out[a.Scale(s) + i] = scales[i];
  uint8_t copy[kTile + kLanes];
  uint8_t* const out = a.Out<uint8_t>(s);
  uint8_t* const codes = s.n % kLanes == 0 ? out : copy;
  Blocks<C>(count, scales).ForEach(s.n, a.block, [=](int64_t i, const typename C::Block& block) {
    PutCodes<C>(codes + i * C::kBits / 8, encode(Lanes<Floats>(x + i), block, i));
  });
  if (codes == out) return;
  if (s.n * C::kBits % 8 != 0) codes[s.n / 2] &= 15;  // without a partner
  std::memcpy(out, codes, a.Bytes(s.n));
}

template <int kBits>
void StoreRatios(const Array& a, const Span& s, const float* x, const uint32_t* random, float narrowing) {
  using C = Ratios<kBits>;
  StoreCodes<C>(a, s, x, [=](Floats some, const typename C::Block& block, int64_t i) {
    return C::Encode(some, block, Lanes<Words>(random + i), narrowing);
  });
}

template <int kBits>
void StoreSquares(const Array& a, const Span& s, const float* x, const uint32_t* random) {
  using C = Squares<kBits>;
  StoreCodes<C>(a, s, x, [=](Floats some, const typename C::Block& block, int64_t i) {
    Words bits = Lanes<Words>(random + i) << 9;
    return C::Encode(some, block, kBits == 4 ? Hash(bits) : bits);
  });
}

// To nearest: half of what is cut off is added; in 4 bits a quarter, because a maximum keeps each rounding up for ever.
template <int kBits>
void StoreLargest(const Array& a, const Span& s, const float* x) {
  using C = Squares<kBits>;
  StoreCodes<C>(a, s, x, [=](Floats some, const typename C::Block& block, int64_t) {
    return C::Encode(some, block, (kBits == 4 ? 0x40000000u : 0x80000000u) + Words{});
  });
}

template <int kBits>
constexpr Format kRatios{nullptr, LoadRatios<kBits>, nullptr, nullptr, StoreRatios<kBits>, nullptr, nullptr};

template <int kBits>
constexpr Format kSquares{LoadSquares<kBits>, nullptr, nullptr, nullptr, nullptr, StoreSquares<kBits>, StoreLargest<kBits>};

// In 8 and 4 bits.
constexpr const Format* kCodesOfMeans[] = {&kRatios<8>, &kRatios<4>};
constexpr const Format* kCodesOfSquares[] = {&kSquares<8>, &kSquares<4>};

// The prefetches during the step of a tile: of p, g, m and v, the numbers of a later tile.
struct Ahead {
  static constexpr int64_t kNumbers = 16;  // at a time

  const char* next[4];
  int64_t bytes[4];  // of these numbers

  // To be called before each vector, with its place.
  void Prefetch(int64_t at, int first = 0, int last = 4) {
    if (kLanes < kNumbers && at % kNumbers != 0) return;
    for (int i = first; i < last; ++i) {
      __builtin_prefetch(next[i]);
      next[i] += bytes[i];
    }
  }
};

// The arrays of a tile in float32, in the cache. `update` takes the updates if they are not simply added.
struct Tile {
  float *p, *m, *v, *top, *update;
  const float* g;
};

// The arctangent of y / x for x above 0: a polynomial on [0, tan(pi / 8)], after S. Moshier's Cephes library.
template <class T>
T Atan2(T y, T x) {
  T size = Abs(y), low = Min(size, x), high = Max(size, x);
  T t = low / (high > 0 ? high : T{} + 1);
  auto far = t > 0.41421356f;
  t = far ? (t - 1) / (t + 1) : t;
  T z = t * t;
  T angle = (((8.05374449538e-2f * z - 1.38776856032e-1f) * z + 1.99777106478e-1f) * z - 3.33329491539e-1f) * z * t + t;
  angle = far ? angle + 0.78539816f : angle;
  angle = size > x ? 1.57079633f - angle : angle;
  return y < 0 ? -angle : angle;
}

// The formulas, for numbers or vectors of them. The third array of AdEMAMix is its slow mean, of others a maximum. The
// schedule-free rule has z in place of the first moment.
template <Rule kRule, bool kApart, bool kNesterov, bool kThird, bool kCoupled, bool kDecays>
struct Form {
  static constexpr bool kMixes = kRule == Rule::kAdEMAMix, kMaximum = kThird && !kMixes;

  template <class T>
  static T Gradient(const Scalars& s, T g, T p) {
    g = s.sign * Limited(g, s.limit);
    return kCoupled ? Limited(g + s.coupled * p, s.largest) : g;
  }

  template <class T>
  static T Mean(const Scalars& s, T m, T g) {
    return s.keep1 * m + s.a1 * (g - s.undo1 * m);
  }

  // What the first moment is a mean of, given the second moment before.
  template <class T>
  static T Sample(const Scalars& s, T g, T v) {
    if (kRule != Rule::kADOPT) return g;
    T normalised = g / Max(Root(v), T{} + s.eps), size = Abs(normalised);
    return normalised * (size > s.most ? s.most / size : T{} + 1);  // infinity becomes NaN, which shows
  }

  template <class T>
  static T Slow(const Scalars& s, T slow, T g) {
    return s.keep3 * slow + s.a3 * (g - s.undo3 * slow);
  }

  template <class T>
  static T Square(const Scalars& s, T v, T g) {
    return s.keep2 * v + s.a2 * (g * g - s.undo2 * v);
  }

  template <class T>
  static T Numerator(const Scalars& s, T g, T m, T slow) {
    T direction = s.of_m * m;
    // 0 times an infinite gradient would be NaN, which a cautious step takes for a sign that disagrees.
    if (kNesterov && s.of_g != 0) direction += s.of_g * g;
    if (kMixes) direction += s.of_slow * slow;
    return direction;
  }

  // Whether a direction has the sign of the gradient. No product, which could underflow.
  template <class T>
  static auto Agrees(const Scalars& s, T direction, T g) {
    T signed_ = s.agreeing * direction;
    return ((signed_ > 0) & (g > 0)) | ((signed_ < 0) & (g < 0));
  }

  template <class T>
  static T Update(const Scalars& s, T g, T m, T largest, T slow, T p) {
    T direction = Numerator(s, g, m, slow);
    if (kRule == Rule::kCautious) direction = Agrees(s, direction, g) ? direction : T{};
    if (kRule != Rule::kADOPT) {
      T root = Root(largest * s.by_c2 + s.eps_root) + s.eps;
      direction = kRule == Rule::kAtan2 ? s.angle * Atan2(direction, s.of_root * root) : direction / root;
    }
    if (!kDecays) return direction;
    return direction + Agreeing(s.decay * p, direction, s.cautious);
  }

  template <class T>
  static T Maximum(const Scalars& s, T top, T square) {
    return MaxOrNaN(top, square * s.kept_by_c2);
  }

  // The factor of a whole array follows from a sum over its numbers: in a cautious step, of 1 for each that agrees with
  // its gradient; in StableAdamW's, of the squares of g / sqrt(v). These need one moment, as it is after the step.
  static constexpr bool kOfFirst = kRule == Rule::kCautious;  // the first moment, and not the second

  static Floats MomentAfter(const Scalars& s, Floats before, Floats g) {
    return kOfFirst ? Mean(s, before, g) : Square(s, before, g);
  }

  static Floats Term(const Scalars& s, Floats moment, Floats g) {
    if (kOfFirst) return Agrees(s, Numerator(s, g, moment, Floats{}), g) ? 1 + Floats{} : Floats{};
    return g * g / MaxOrNaN(moment * s.by_c2, s.eps * s.eps + Floats{});
  }

  // The sum of `n` terms. `after` is called with the place of a vector, and its gradients, and returns its moments. Zeros
  // that fill the last vector have terms of 0.
  template <class F>
  static double Sum(int64_t n, const Scalars& s, const float* g, F after) {
    Floats terms{};
    for (int64_t i = 0; i < n; i += kLanes) {
      const Floats gradient = Gradient(s, Some(g + i, n - i), Floats{});
      terms += Term(s, after(i, gradient), gradient);
    }
    double sum = 0;
    for (int64_t i = 0; i < kLanes; ++i) sum += terms[i];
    return sum;
  }

  // The same, given the moments before the step.
  static double SumOf(int64_t n, const Scalars& scalars, const float* g, const float* before) {
    const Scalars s = scalars;
    return Sum(n, s, g, [&](int64_t i, Floats gradient) { return MomentAfter(s, Some(before + i, n - i), gradient); });
  }

  // The same of moments in half precision, which are rounded as the step will store them.
  template <class T>
  static double SumOfHalves(const Span& span, const Scalars& scalars, const float* g, const Array& moment,
                            const Dither& dither, uint32_t first) {
    const Scalars s = scalars;
    const Dither d = dither;
    alignas(64) float before[kTile + kLanes];
    Load<T>(moment, span, before);
    return Sum(span.n, s, g, [&](int64_t i, Floats gradient) {
      const Floats after = MomentAfter(s, Some(before + i, span.n - i), gradient);
      const Words random = Random(first + static_cast<uint32_t>(i), d);
      return kOfFirst ? RoundedMean<T>(after, random) : RoundedSquare<T>(after, random);
    });
  }

  // The step of loaded numbers, or a part of the step. The caller loads and stores.
  enum Part { kAll, kMoments, kTop, kUpdate };

  template <Part part, class T>
  static void At(int64_t i, const Scalars& s, const Tile& tile) {
    // Load all before storing: if arrays have the same page offsets, a store would delay the loads after it.
    T p{}, g = Lanes<T>(tile.g + i);
    if constexpr (kCoupled || kDecays || !kApart) p = Lanes<T>(tile.p + i);
    g = Gradient(s, g, p);
    T m = Lanes<T>(tile.m + i), v = Lanes<T>(tile.v + i), third{};
    if constexpr (kThird) third = Lanes<T>(tile.top + i);
    if constexpr (kRule == Rule::kScheduleFree) {
      if constexpr (part == kAll || part == kMoments) Put(tile.v + i, v = Square(s, v, g));
      if constexpr (part == kAll || part == kUpdate) {
        T d = g / (Root(v * s.by_c2 + s.eps_root) + s.eps) + s.decay * p, u = s.pull * (m - p) - s.push * d;
        Put(tile.m + i, m - s.rate * d);
        kApart ? Put(tile.update + i, u) : Put(tile.p + i, p + u);
      }
      return;
    }
    if constexpr (part == kAll || part == kMoments) {
      m = Mean(s, m, Sample(s, g, v));
      v = Square(s, v, g);
      Put(tile.m + i, m);
      Put(tile.v + i, v);
    }
    if constexpr (part == kAll || part == kTop) {
      if (kThird) {
        third = kMixes ? Slow(s, third, g) : Maximum(s, third, v);
        Put(tile.top + i, third);
      }
    }
    if constexpr (part == kAll || part == kUpdate) {
      T u = Update(s, g, m, kMaximum ? third : v, third, p);
      kApart ? Put(tile.update + i, u) : Put(tile.p + i, p + u);
    }
  }

  template <Part part>
  static void Step(int64_t n, const Scalars& scalars, Ahead& ahead_, const Tile& tile_) {
    const Scalars s = scalars;  // a local copy tells the compiler that no store changes it
    Ahead ahead = ahead_;
    const Tile tile = tile_;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      if (part == kAll) ahead.Prefetch(i);
      if (part == kMoments) ahead.Prefetch(i, 1);
      if (part == kUpdate) ahead.Prefetch(i, 0, 1);
      At<part, Floats>(i, s, tile);
    }
    for (; i < n; ++i) At<part, float>(i, s, tile);
  }

  // The step of two bfloat16 moments in full vectors: all in one loop.
  static void StepBFloat16(const Span& span, const Scalars& scalars, Ahead& ahead_, const Tile& tile_, const Array& m,
                           const Array& v, const Dither& dither, uint32_t first) {
    const Scalars s = scalars;
    Ahead ahead = ahead_;
    const Tile tile = tile_;
    const Dither d = dither;
    const int64_t n = span.n;
    const uint16_t *m_in = m.In<uint16_t>(span), *v_in = v.In<uint16_t>(span);
    uint16_t *m_out = m.Out<uint16_t>(span), *v_out = v.Out<uint16_t>(span);
    auto wide = [](Words bits) { return reinterpret_cast<Floats>(bits); };
    for (int64_t i = 0; i < n; i += kLanes) {
      ahead.Prefetch(i);
      Floats p = Lanes<Floats>(tile.p + i), g = Gradient(s, Lanes<Floats>(tile.g + i), p);
      Floats before = wide(WidenedHalves(v_in + i) << 16);
      Floats mean = Mean(s, wide(WidenedHalves(m_in + i) << 16), Sample(s, g, before));
      Floats square = Square(s, before, g);
      Words random = Random(first + static_cast<uint32_t>(i), d);
      Words m_bits = BFloat16::CutBits(mean, random);
      Words v_bits = BFloat16::CutBits(square, random << 9);
      Floats u = Update(s, g, wide(m_bits & 0xFFFF0000), wide(v_bits & 0xFFFF0000), Floats{}, p);
      PutHalves(m_out + i, m_bits >> 16);
      PutHalves(v_out + i, v_bits >> 16);
      kApart ? Put(tile.update + i, u) : Put(tile.p + i, p + u);
    }
  }
};

struct Steps {
  using OfNumbers = void (*)(int64_t, const Scalars&, Ahead&, const Tile&);
  OfNumbers all, moments, top, update;
  using OfVectors = void (*)(const Span&, const Scalars&, Ahead&, const Tile&, const Array&, const Array&, const Dither&,
                             uint32_t);
  OfVectors bfloat16;
};

template <class F>
Steps StepsOf() {
  return {F::template Step<F::kAll>, F::template Step<F::kMoments>, F::template Step<F::kTop>,
          F::template Step<F::kUpdate>, F::StepBFloat16};
}

// Of rules that are rarer than Adam's: with what a scalar of 0 leaves out, to compile less.
template <Rule rule, bool kThird>
Steps Choose(bool apart) {
  return apart ? StepsOf<Form<rule, true, true, kThird, false, true>>() : StepsOf<Form<rule, false, true, kThird, false, true>>();
}

template <bool... chosen>
Steps Choose() {
  return StepsOf<Form<Rule::kAdam, chosen...>>();
}

template <bool... chosen, class... Rest>
Steps Choose(bool next, Rest... rest) {
  return next ? Choose<chosen..., true>(rest...) : Choose<chosen..., false>(rest...);
}

// The sums that the factor of a whole array is made of, by the format of the moment.
struct Sums {
  bool of_first;  // by the first moment, and not the second
  double (*numbers)(int64_t, const Scalars&, const float*, const float*);
  using OfHalves = double (*)(const Span&, const Scalars&, const float*, const Array&, const Dither&, uint32_t);
  OfHalves bfloat16, float16;
};

template <Rule rule, class F = Form<rule, false, true, false, false, false>>
constexpr Sums kSums{F::kOfFirst, F::SumOf, F::template SumOfHalves<BFloat16>, F::template SumOfHalves<Float16>};

// The place of a shard in the global array. Random numbers depend on the global index.
struct Place {
  std::vector<int64_t> shape, whole;
  const uint32_t* offsets;

  // The global index of the first number of a span.
  uint32_t Index(int64_t row, int64_t column) const {
    uint32_t index = 0, unit = 1;
    for (size_t axis = shape.size(); axis-- > 0;) {
      bool is_last = axis + 1 == shape.size();
      int64_t at = is_last ? column : row % shape[axis];
      if (!is_last) row /= shape[axis];
      index += unit * (offsets[axis] + static_cast<uint32_t>(at));
      unit *= static_cast<uint32_t>(whole[axis]);
    }
    return index;
  }
};

// Flush subnormal numbers to 0, as XLA does.
class Flushing {
 public:
#if defined(__SSE__)
  Flushing() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~Flushing() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

struct Progress {
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;
};

// Call `task` for 0, ..., count - 1, in runs [begin, end), on XLA's threads and this one. Runs are long at first, for
// sequential memory access, and become shorter, so that all threads end together. Never wait for a task that has not
// begun: it might itself be waiting for this thread.
void Parallel(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t, int64_t)>& task) {
  auto progress = std::make_shared<Progress>();
  const int64_t threads = pool.num_threads();
  std::function<void()> work = [=] {
    Flushing flushing;
    int64_t mine = 0;
    for (int64_t begin = progress->next.load(), end; begin < count;) {
      end = std::min(count, begin + std::max(kLeast, (count - begin) / (2 * threads)));
      if (!progress->next.compare_exchange_weak(begin, end)) continue;
      task(begin, end);
      mine += end - begin;
      begin = progress->next.load();
    }
    if (mine > 0 && progress->done.fetch_add(mine) + mine == count) {
      std::lock_guard<std::mutex> lock(progress->mutex);
      progress->finished.notify_all();
    }
  };
  for (int64_t i = 1; i < std::min(threads, (count + kLeast - 1) / kLeast); ++i) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->finished.wait(lock, [&] { return progress->done.load() == count; });
}

struct Job {
  Steps steps;
  Steps::OfVectors of_vectors = nullptr;  // of `steps`, if one of its vector loops does the whole step
  Array p, g, m, v, top;
  Landing landing = Landing::kNone;
  Array kept;    // the part of the parameter that its dtype cannot hold, if stored
  Array update;  // the result in place of the parameter, which then stays as it is
  bool third, rounds;
  bool mixes;  // whether the third array is a mean, and not a maximum
  int64_t rows, columns;  // of one array of a batch
  bool is_whole;          // if so, the index of a number is its offset in memory
  bool is_grouped = false;  // if so, only the moments are part of a larger array
  Place place;

  void SetStrides() {
    rounds = m.format != nullptr || v.format != nullptr;
    for (Array* x : {&p, &g, &m, &v, &top, &kept, &update}) {
      x->stride = x->Bytes(columns);
      x->ahead = rounds ? kFarAhead : kAhead;
    }
  }

  // Set the fields that follow from the arrays.
  void Complete(Rule rule, bool nesterov, bool coupled, bool decays) {
    SetStrides();
    bool apart = landing == Landing::kNone ? p.format != nullptr || update.out != nullptr : landing == Landing::kCompensated;
    mixes = rule == Rule::kAdEMAMix;
    switch (rule) {
      case Rule::kAdam:
        steps = Choose<>(apart, nesterov, third, coupled, decays);
        break;
      case Rule::kCautious:
        steps = third ? Choose<Rule::kCautious, true>(apart) : Choose<Rule::kCautious, false>(apart);
        break;
      case Rule::kAdEMAMix:
        steps = Choose<Rule::kAdEMAMix, true>(apart);
        break;
      case Rule::kADOPT:
        steps = Choose<Rule::kADOPT, false>(apart);
        break;
      case Rule::kScheduleFree:
        steps = Choose<Rule::kScheduleFree, false>(apart);
        break;
      case Rule::kAtan2:
        steps = Choose<Rule::kAtan2, false>(apart);
        break;
    }
    if (third) return;
    if (m.format == &kFloat<BFloat16> && v.format == &kFloat<BFloat16>) of_vectors = steps.bfloat16;
  }

  void Run(const Span& span, int64_t first_row, const Scalars& s, const Dithers& dithers) const {
    const Dither& d = dithers.moments;
    constexpr int64_t kBuffer = kTile + kLanes;  // numbers past the end of a span are read, but not used
    alignas(64) float buffers[7][kBuffer];
    constexpr int64_t kEach = Ahead::kNumbers;
    Ahead ahead{{p.Ahead(span), g.Ahead(span), m.Ahead(span), v.Ahead(span)},
                {p.Bytes(kEach), g.Bytes(kEach), m.Bytes(kEach), v.Bytes(kEach)}};
    for (const Array* x : {&m, &v}) {
      if (x->block > 0) __builtin_prefetch(x->scales_in + x->Scale(span) + x->ahead / x->block);
    }
    if (kept.in != nullptr) {
      for (int64_t i = 0; i < kept.Bytes(kTile); i += kLine) __builtin_prefetch(kept.Ahead(span) + i);
    }
    uint32_t first = Index(span, first_row);
    uint32_t first_of_p = is_grouped ? static_cast<uint32_t>(span.column) : first;
    Tile tile{Read(span, buffers[0]), buffers[2], buffers[3], nullptr, buffers[5], g.Bring(span, buffers[1])};
    const bool in_place = landing == Landing::kNone && update.out != nullptr && update.format == nullptr;
    if (in_place) tile.update = update.Out<float>(span);
    if (of_vectors != nullptr && span.n % kLanes == 0) {
      of_vectors(span, s, ahead, tile, m, v, d, first);
    } else {
      tile.v = v.Bring(span, buffers[3]);
      tile.m = m.BringMean(span, tile.v, buffers[2]);
      if (third) tile.top = mixes ? top.BringMean(span, tile.v, buffers[4]) : top.Bring(span, buffers[4]);
      bool settles = m.IsNarrow() || v.IsNarrow() || top.IsNarrow();
      (settles ? steps.moments : steps.all)(span.n, s, ahead, tile);
      if (rounds) {
        alignas(64) uint32_t random[kBuffer];
        Draw(span, first, d, random);
        if (v.format != nullptr) v.format->store_square(v, span, tile.v, random);
        v.Settle(span, tile.v);
        if (m.format != nullptr) {
          m.format->store_mean(m, span, Stored(m, tile.m, span, tile, buffers[6]), random, s.a1 * kNarrowing);
        }
      }
      if (settles) {  // the step goes on with half precision moments as stored; see ../storage.py
        m.Settle(span, tile.m);
        if (third) steps.top(span.n, s, ahead, tile);
      }
      if (third && top.format != nullptr) {
        mixes ? StoreSlow(span, s, tile, first, d, buffers[6]) : top.format->store_maximum(top, span, tile.top);
      }
      if (settles) {
        top.Settle(span, tile.top);
        steps.update(span.n, s, ahead, tile);
      }
    }
    if (update.out != nullptr) {
      if (!in_place) Deliver(span, tile, first_of_p, dithers.parameter);
    } else if (p.format != nullptr) {
      Land(p, span, span, tile, first_of_p, dithers.parameter);
    }
  }

  // The global index of the first number of a span.
  uint32_t Index(const Span& span, int64_t first_row) const {
    const int64_t row = span.row - first_row;
    return is_whole ? static_cast<uint32_t>(row * columns + span.column) : place.Index(row, span.column);
  }

  // The sum over a span, for the factor of a whole array. Nothing is prefetched: that is slower for two arrays that are
  // only read.
  double Sum(const Sums& sums, const Span& span, int64_t first_row, const Scalars& s, const Dither& d) const {
    constexpr int64_t kBuffer = kTile + kLanes;
    alignas(64) float buffers[3][kBuffer];
    const float* gradient = g.Bring(span, buffers[0]);
    const Array& moment = sums.of_first ? m : v;
    if (moment.IsNarrow()) {
      auto sum = moment.format == &kFloat<BFloat16> ? sums.bfloat16 : sums.float16;
      return sum(span, s, gradient, moment, d, Index(span, first_row));
    }
    const float* square = sums.of_first && m.block == 0 ? nullptr : v.Bring(span, buffers[1]);
    return sums.numbers(span.n, s, gradient, sums.of_first ? m.BringMean(span, square, buffers[2]) : square);
  }

  void StoreSlow(const Span& span, const Scalars& s, const Tile& tile, uint32_t first, const Dither& d, float* buffer) const {
    alignas(64) uint32_t random[kTile + kLanes];
    Draw(span, first, d.ThirdArray(), random);
    top.format->store_mean(top, span, Stored(top, tile.top, span, tile, buffer), random, s.a3 * kNarrowing);
  }

  // What is stored of first moments: codes are of their ratios to the root of the second ones.
  const float* Stored(const Array& means, const float* mean, const Span& span, const Tile& tile, float* buffer) const {
    if (means.block == 0) return mean;
    auto put = [&](int64_t i, Floats v) { Put(buffer + i, 0.5f * Lanes<Floats>(mean + i) * TwiceInverseRoot(v)); };
    if (v.format == &kSquares<4>) {  // a block holds no smaller number than its first
      using C = Squares<4>;
      alignas(64) uint32_t scales[kTile + kLanes];
      const int64_t count = (span.n + v.block - 1) / v.block;
      for (int64_t i = 0; i < count; ++i) scales[i] = v.scales_out[v.Scale(span) + i];
      Blocks<C>(count, scales).ForEach(span.n, v.block, [&](int64_t i, const C::Block& block) {
        put(i, Max(block.Lowest(), Lanes<Floats>(tile.v + i)));
      });
    } else {
      alignas(64) float copy[kTile + kLanes];
      const float* square = Padded(tile.v, span.n, copy);
      for (int64_t i = 0; i < span.n; i += kLanes) put(i, Lanes<Floats>(square + i));
    }
    return buffer;
  }

  static void Draw(const Span& span, uint32_t first, const Dither& d, uint32_t* random) {
    for (int64_t i = 0; i < span.n; i += kLanes) Put(random + i, Random(first + static_cast<uint32_t>(i), d));
  }

  // Load the parameter in float32.
  float* Read(const Span& span, float* buffer) const {
    if (landing == Landing::kMaster) return kept.Bring(span, buffer);
    if (landing != Landing::kLowBits) return p.Bring(span, buffer);
    kept.bits == 8 ? Join<uint8_t>(span, buffer) : Join<uint16_t>(span, buffer);
    return buffer;
  }

  template <class Low>
  void Join(const Span& span, float* __restrict__ to) const {
    constexpr int kWidth = 8 * sizeof(Low);
    const uint16_t* __restrict__ high = p.In<uint16_t>(span);
    const Low* __restrict__ low = kept.In<Low>(span);
    for (int64_t i = 0; i < span.n; ++i) {
      // If the lower half is at least one half, the parameter was rounded up.
      uint32_t upper = uint32_t{high[i]} - (low[i] >> (kWidth - 1));
      to[i] = Number(upper << 16 | uint32_t{low[i]} << (16 - kWidth));
    }
  }

  // Store the update: rounded, or the difference to the half precision parameter that a wrapper rounds to.
  void Deliver(const Span& span, const Tile& tile, uint32_t first, const Dither& d) const {
    if (landing == Landing::kNone) return update.format->store_nearest(update, span, tile.update);
    alignas(64) float before[kTile + kLanes], after[kTile + kLanes];
    alignas(64) char halves[kTile * 2];
    Array landed = p;
    landed.in = landed.out = halves;
    const Span at{0, 0, span.n};
    p.format->load(p, span, before);
    Land(landed, at, span, tile, first, d);
    p.format->load(landed, at, after);
    float* difference = update.Out<float>(span);
    for (int64_t i = 0; i < span.n; ++i) difference[i] = after[i] == before[i] ? 0 : after[i] - before[i];
    if (landing != Landing::kLowBits) return;
    kept.bits == 8 ? Trim<uint8_t>(span, before, after, difference) : Trim<uint16_t>(span, before, after, difference);
  }

  // Keep the lower bits only where the difference leads to their parameter: near 0, float32 may not hold it.
  template <class Low>
  void Trim(const Span& span, const float* before, const float* after, const float* difference) const {
    Low* low = kept.Out<Low>(span);
    const int64_t n = span.n;  // the compiler takes bytes for aliases of it
    for (int64_t i = 0; i < n; ++i) {
      if (Upper(Bits(before[i] + difference[i])) != Bits(after[i]) >> 16) low[i] = 0;
    }
  }

  // Store the half precision parameters of a span at a place of `to`, and the part that they cannot hold.
  void Land(const Array& to, const Span& at, const Span& span, const Tile& tile, uint32_t first, const Dither& d) const {
    alignas(64) uint32_t random[kTile + kLanes];
    switch (landing) {
      case Landing::kNone:
        return AddRounded(span, tile);
      case Landing::kMaster:
        return p.format->store_nearest(to, at, tile.p);
      case Landing::kLowBits:
        if (kept.bits == 16) return Split<uint16_t>(to, at, span, tile, nullptr);
        Draw(span, first, d, random);
        return Split<uint8_t>(to, at, span, tile, random);
      case Landing::kStochastic:
        Draw(span, first, d, random);
        return p.format->store_random(to, at, tile.p, random);
      case Landing::kCompensated:
        Draw(span, first, d, random);
        return Compensate(to, at, span, tile, random);
    }
  }

  // The upper half of the bits of a number, rounded to nearest.
  static uint16_t Upper(uint32_t bits) { return (bits + 0x8000) >> 16; }

  // Store the upper halves of the bits, rounded to nearest, and what `Low` holds of the lower halves, rounded at random.
  template <class Low>
  void Split(const Array& to, const Span& at, const Span& span, const Tile& tile, const uint32_t* __restrict__ random) const {
    constexpr int kCut = 16 - 8 * sizeof(Low);
    const float* __restrict__ x = tile.p;
    uint16_t* __restrict__ high = to.Out<uint16_t>(at);
    Low* __restrict__ low = kept.Out<Low>(span);
    const int64_t n = span.n;  // the compiler takes bytes for aliases of it
    for (int64_t i = 0; i < n; ++i) {
      uint32_t bits = Bits(x[i]);
      if ((bits & 0x7F800000) == 0) bits = 0;  // 0 or subnormal
      if (x[i] != x[i]) bits = 0x7FC00000;
      if constexpr (kCut > 0) bits += random[i] >> (32 - kCut);
      high[i] = Upper(bits);
      low[i] = bits >> kCut;
    }
  }

  // Kahan's sum: add the update and the old residual, and store the rounding error as the new residual.
  void Compensate(const Array& to, const Span& at, const Span& span, const Tile& tile, const uint32_t* random) const {
    alignas(64) float wanted[kTile + kLanes], landed[kTile + kLanes];
    kept.format->load(kept, span, wanted);
    for (int64_t i = 0; i < span.n; ++i) {
      wanted[i] += tile.update[i];
      landed[i] = tile.p[i] + wanted[i];
    }
    p.format->store_nearest(to, at, landed);
    to.Settle(at, landed);
    for (int64_t i = 0; i < span.n; ++i) wanted[i] -= landed[i] - tile.p[i];
    kept.format->store_random(kept, span, wanted, random);
  }

  // Round the update to the dtype of the parameter before adding it.
  void AddRounded(const Span& span, const Tile& tile) const {
    char rounded[kTile * 2];
    Array addend = p;
    addend.in = addend.out = rounded;
    Span here{0, 0, span.n};
    p.format->store_nearest(addend, here, tile.update);
    p.format->load(addend, here, tile.update);
    for (int64_t i = 0; i < span.n; ++i) tile.p[i] += tile.update[i];
    p.format->store_nearest(p, span, tile.p);
  }
};

// Takes operands and their results in order.
class Operands {
 public:
  Operands(ffi::RemainingArgs arrays, ffi::RemainingRets results) : arrays_(arrays), results_(results) {}

  // The error message, or null.
  const char* wrong = nullptr;

  // The part of half precision parameters that their dtype cannot hold, if it is stored.
  Array TakeKept(Landing landing, int64_t size, int64_t row) {
    if (landing == Landing::kCompensated || landing == Landing::kMaster) return Take(true, size, row, 0, 0);
    Array array;
    if (landing != Landing::kLowBits) return array;
    // Lower bits of float32 numbers are not numbers themselves.
    ffi::DataType type = Next(true, size, &array.in, &array.out);
    if (type != ffi::U16 && type != ffi::U8 && wrong == nullptr) wrong = "adamjax: unknown dtype";
    array.bits = type == ffi::U8 ? 8 : 16;
    return array;
  }

  // A result of `size` floats that no argument becomes.
  Array TakeResult(int64_t size) {
    Array array;
    auto result = results_.get<ffi::AnyBuffer>(next_out_++);
    if (!result.has_value() || static_cast<int64_t>((*result)->element_count()) != size) {
      wrong = "adamjax: a result is missing, or of the wrong size";
      return array;
    }
    SetFormat(array, (*result)->element_type());
    array.out = static_cast<char*>((*result)->untyped_data());
    return array;
  }

  // An array of `size` numbers; if `block` is not 0, as codes of some bits, and scales.
  Array Take(bool is_changed, int64_t size, int64_t row, int64_t block, int64_t bits) {
    Array array;
    int64_t count = size;
    if (block > 0) count = size / row * ((row * bits + 7) / 8);
    ffi::DataType type = Next(is_changed, count, &array.in, &array.out);
    if (wrong != nullptr) return array;
    if (block == 0) {
      SetFormat(array, type);
    } else {
      array.bits = bits;
      array.block = block;
      array.blocks = (row + block - 1) / block;
      const char* scales_in;
      char* scales_out = nullptr;
      const int64_t scales = size / row * array.blocks;
      if (Next(is_changed, scales, &scales_in, &scales_out) != ffi::U16) wrong = "adamjax: wrong scales";
      array.scales_in = reinterpret_cast<const uint16_t*>(scales_in);
      array.scales_out = reinterpret_cast<uint16_t*>(scales_out);
      if (kTile % block != 0) wrong = "adamjax: blocks of this size do not fill a tile";
    }
    return array;
  }

  // The same of a moment, given the formats of its codes.
  Array TakeMoment(const Format* const* codes, bool is_changed, int64_t size, int64_t row, int64_t block, int64_t bits) {
    Array array = Take(is_changed, size, row, block, bits);
    if (block > 0) array.format = codes[bits == 8 ? 0 : 1];
    return array;
  }

 private:
  void SetFormat(Array& array, ffi::DataType type) {
    if (type == ffi::BF16) array.format = &kFloat<BFloat16>;
    if (type == ffi::F16) array.format = &kFloat<Float16>;
    if (array.format != nullptr) array.bits = 16;
    if (type != ffi::F32 && array.format == nullptr) wrong = "adamjax: unknown dtype";
  }

  ffi::DataType Next(bool is_changed, int64_t count, const char** in, char** out) {
    auto array = arrays_.get<ffi::AnyBuffer>(next_in_++);
    if (!array.has_value() || static_cast<int64_t>(array->element_count()) != count) {
      wrong = "adamjax: an array is missing, or of the wrong size";
      return ffi::DataType::INVALID;
    }
    *in = static_cast<const char*>(array->untyped_data());
    if (!is_changed) return array->element_type();
    auto result = results_.get<ffi::AnyBuffer>(next_out_++);
    if (!result.has_value() || (*result)->element_type() != array->element_type() ||
        (*result)->element_count() != array->element_count()) {
      wrong = "adamjax: a result is not like its argument";
      return ffi::DataType::INVALID;
    }
    *out = static_cast<char*>((*result)->untyped_data());
    return array->element_type();
  }

  ffi::RemainingArgs arrays_;
  ffi::RemainingRets results_;
  size_t next_in_ = 0, next_out_ = 0;
};

// Arrays of one shape in one call, each with a row of scalars and a row of integers.
class Batch {
 public:
  Batch(const ffi::Buffer<ffi::F32>& scalars, const ffi::Buffer<ffi::U32>& dithers, int64_t axes)
      : count(scalars.element_count() / kScalars),
        scalars_(scalars.typed_data()),
        dithers_(dithers.typed_data()),
        width_(kDithers + axes),
        fits_(count > 0 && static_cast<int64_t>(scalars.element_count()) == count * kScalars &&
              static_cast<int64_t>(dithers.element_count()) == count * width_) {}

  const int64_t count;

  // Set the rows and the place of a job by one of its arrays. Returns whether there is a row of scalars for each.
  bool Shape(Job& job, const ffi::AnyBuffer& array, ffi::Span<const int64_t> whole, ffi::Span<const int64_t> block) const {
    const int64_t size = array.element_count(), axes = whole.size();
    if (!fits_ || size % count != 0) return false;
    auto shape = array.dimensions();
    job.place.shape.assign(shape.end() - axes, shape.end());
    job.place.whole.assign(whole.begin(), whole.end());
    job.is_whole = job.place.shape == job.place.whole;
    // Rows that begin with a block each follow each other like one.
    bool is_one_row = job.is_whole;
    for (int64_t of_moment : block) is_one_row = is_one_row && (of_moment == 0 || shape.back() % of_moment == 0);
    job.columns = is_one_row ? size / count : shape.back();
    job.rows = size / count / job.columns;
    return true;
  }

  // The tiles of each array.
  static int64_t Tiles(const Job& job) { return job.rows * ((job.columns + kTile - 1) / kTile); }

  // Call `task` with the number of each tile, the job at its array, its span, the first row of its array, and the scalars
  // and dithers of that.
  template <class F>
  void ForEachTile(ffi::ThreadPool& pool, const Job& job, F task) const {
    const int64_t of_row = (job.columns + kTile - 1) / kTile;
    Parallel(pool, count * Tiles(job), [&](int64_t begin, int64_t end) {
      Job mine = job;
      Scalars s;
      Dithers d;
      for (int64_t tile = begin, last = -1; tile < end; ++tile) {
        int64_t row = tile / of_row, column = tile % of_row * kTile, b = row / job.rows;
        if (b != last) {
          const uint32_t* dither = dithers_ + b * width_;
          std::memcpy(&s, scalars_ + b * kScalars, sizeof(s));
          std::memcpy(&d, dither, sizeof(d));
          mine.place.offsets = dither + kDithers;
          last = b;
        }
        task(tile, mine, Span{row, column, std::min(kTile, job.columns - column)}, b * job.rows, s, d);
      }
    });
  }

 private:
  const float* scalars_;
  const uint32_t* dithers_;
  const int64_t width_;  // of a row of integers
  const bool fits_;
};

// A step that delivers an update and has no need of the parameter is given none. `bits` and `block` describe the codes of
// the first moment, the second, and the third array; 0 for floats. Only Adam's rule takes `coupled` decay.
ffi::Error Impl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> scalars, ffi::Buffer<ffi::U32> dithers,
                ffi::RemainingArgs arrays, ffi::RemainingRets results, int64_t rule, bool nesterov, bool third,
                bool as_update, int64_t landing, bool coupled, bool decays, ffi::Span<const int64_t> whole,
                ffi::Span<const int64_t> bits, ffi::Span<const int64_t> block) {
  auto parameters = arrays.get<ffi::AnyBuffer>(0);
  if (!parameters.has_value()) return ffi::Error::InvalidArgument("adamjax: no parameters");
  Job job;
  const Batch batch(scalars, dithers, whole.size());
  if (!batch.Shape(job, *parameters, whole, block)) return ffi::Error::InvalidArgument("adamjax: scalars of the wrong shape");
  const int64_t size = parameters->element_count();
  Operands operands(arrays, results);
  job.third = third;
  job.landing = static_cast<Landing>(landing);
  const bool reads = !as_update || coupled || decays || job.landing != Landing::kNone;
  if (reads) job.p = operands.Take(!as_update, size, job.columns, 0, 0);
  if (as_update) job.update = operands.TakeResult(size);
  job.g = operands.Take(false, size, job.columns, 0, 0);
  if (!reads) job.p = job.g;
  Array* const moments[] = {&job.m, &job.v, &job.top};
  const bool mixes = static_cast<Rule>(rule) == Rule::kAdEMAMix;
  const Format* const* const codes[] = {kCodesOfMeans, kCodesOfSquares, mixes ? kCodesOfMeans : kCodesOfSquares};
  for (int i = 0; i < (third ? 3 : 2); ++i) {
    *moments[i] = operands.TakeMoment(codes[i], true, size, job.columns, block[i], bits[i]);
  }
  job.kept = operands.TakeKept(job.landing, size, job.columns);
  if (operands.wrong != nullptr) return ffi::Error::InvalidArgument(operands.wrong);
  job.Complete(static_cast<Rule>(rule), nesterov, coupled, decays);

  batch.ForEachTile(pool, job, [](int64_t, const Job& mine, const Span& span, int64_t first_row, const Scalars& s,
                                  const Dithers& d) { mine.Run(span, first_row, s, d); });
  return ffi::Error::Success();
}

// The sum that the factor of a whole array is made of, for each array: see `Form::Term`. The operands are gradients and
// both moments. The sums of tiles are added in order, so that the number of threads does not change the result.
ffi::Error Sum(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> scalars, ffi::Buffer<ffi::U32> dithers,
               ffi::RemainingArgs arrays, ffi::RemainingRets results, int64_t rule, ffi::Span<const int64_t> whole,
               ffi::Span<const int64_t> bits, ffi::Span<const int64_t> block) {
  auto gradients = arrays.get<ffi::AnyBuffer>(0);
  auto sums = results.get<ffi::Buffer<ffi::F32>>(0);
  if (!gradients.has_value() || !sums.has_value()) return ffi::Error::InvalidArgument("adamjax: an array is missing");
  Job job;
  const Batch batch(scalars, dithers, whole.size());
  if (!batch.Shape(job, *gradients, whole, block) || static_cast<int64_t>((*sums)->element_count()) != batch.count) {
    return ffi::Error::InvalidArgument("adamjax: scalars or sums of the wrong shape");
  }
  const int64_t size = gradients->element_count();
  Operands operands(arrays, results);
  job.g = operands.Take(false, size, job.columns, 0, 0);
  job.m = operands.TakeMoment(kCodesOfMeans, false, size, job.columns, block[0], bits[0]);
  job.v = operands.TakeMoment(kCodesOfSquares, false, size, job.columns, block[1], bits[1]);
  if (operands.wrong != nullptr) return ffi::Error::InvalidArgument(operands.wrong);
  job.SetStrides();
  const Sums& loops = static_cast<Rule>(rule) == Rule::kCautious ? kSums<Rule::kCautious> : kSums<Rule::kAdam>;
  const int64_t tiles = Batch::Tiles(job);
  std::vector<double> parts(batch.count * tiles);
  batch.ForEachTile(pool, job, [&](int64_t tile, const Job& mine, const Span& span, int64_t first_row, const Scalars& s,
                                   const Dithers& d) {
    parts[tile] = mine.Sum(loops, span, first_row, s, d.moments);
  });
  for (int64_t i = 0; i < batch.count; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < tiles; ++j) sum += parts[i * tiles + j];
    (*sums)->typed_data()[i] = static_cast<float>(sum);
  }
  return ffi::Error::Success();
}

// The step of several parameters whose moments are concatenated in float arrays. The operands are all parameters, if
// the step reads them, then all gradients, then the moments, and then what is kept of each parameter. `dithers` has the
// dither of the moments, and then one for each parameter. `coupled` and `decays` say for each parameter whether it decays.
ffi::Error Group(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> scalars, ffi::Buffer<ffi::U32> dithers,
                 ffi::RemainingArgs arrays, ffi::RemainingRets results, int64_t rule, bool nesterov, bool third,
                 bool as_update, int64_t landing, ffi::Span<const int64_t> coupled, ffi::Span<const int64_t> decays) {
  size_t moments = third ? 3 : 2, count = coupled.size();
  bool reads = !as_update || static_cast<Landing>(landing) != Landing::kNone;
  for (size_t i = 0; i < count; ++i) reads = reads || coupled[i] != 0 || decays[i] != 0;
  if (arrays.size() < moments + (reads ? 2 : 1) * count || scalars.element_count() != kScalars || decays.size() != count ||
      dithers.element_count() != 2 * (count + 1)) {
    return ffi::Error::InvalidArgument("adamjax: scalars of the wrong shape, or too few arrays");
  }
  Job whole;
  whole.third = third;
  whole.landing = static_cast<Landing>(landing);
  whole.rows = 1;
  whole.is_whole = false;
  whole.is_grouped = true;
  std::vector<Job> jobs(count, whole);
  std::vector<uint32_t> starts;
  Operands operands(arrays, results);
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    auto parameter = arrays.get<ffi::AnyBuffer>(i);
    if (!parameter.has_value()) return ffi::Error::InvalidArgument("adamjax: an array is missing");
    jobs[i].columns = parameter->element_count();
    if (reads) jobs[i].p = operands.Take(!as_update, jobs[i].columns, jobs[i].columns, 0, 0);
    if (as_update) jobs[i].update = operands.TakeResult(jobs[i].columns);
    starts.push_back(static_cast<uint32_t>(total));
    total += jobs[i].columns;
  }
  for (Job& job : jobs) {
    job.g = operands.Take(false, job.columns, job.columns, 0, 0);
    if (!reads) job.p = job.g;
  }
  Array Job::*const packed[] = {&Job::m, &Job::v, &Job::top};
  for (size_t i = 0; i < moments; ++i) whole.*packed[i] = operands.Take(true, total, total, 0, 0);
  for (Job& job : jobs) job.kept = operands.TakeKept(job.landing, job.columns, job.columns);
  if (operands.wrong != nullptr) return ffi::Error::InvalidArgument(operands.wrong);

  struct At {
    size_t job;
    int64_t column;
  };
  std::vector<At> tiles;
  for (size_t i = 0; i < count; ++i) {
    Job& job = jobs[i];
    for (size_t j = 0; j < moments; ++j) {
      Array& x = job.*packed[j];
      x = whole.*packed[j];
      x.in += x.Bytes(starts[i]);
      x.out += x.Bytes(starts[i]);
    }
    job.place = {{job.columns}, {total}, &starts[i]};
    job.Complete(static_cast<Rule>(rule), nesterov, coupled[i] != 0, decays[i] != 0);
    for (int64_t column = 0; column < job.columns; column += kTile) tiles.push_back({i, column});
  }
  Scalars s;
  std::memcpy(&s, scalars.typed_data(), sizeof(s));
  const uint32_t* all_dithers = dithers.typed_data();
  Parallel(pool, tiles.size(), [&](int64_t begin, int64_t end) {
    Dithers d;
    std::memcpy(&d.moments, all_dithers, sizeof(d.moments));
    for (int64_t i = begin; i < end; ++i) {
      const auto [number, column] = tiles[i];
      const Job& job = jobs[number];
      std::memcpy(&d.parameter, all_dithers + 2 * (number + 1), sizeof(d.parameter));
      job.Run({0, column, std::min(kTile, job.columns - column)}, 0, s, d);
    }
  });
  return ffi::Error::Success();
}

// The operands of all handlers, and the rule.
auto Bound() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::U32>>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<int64_t>("rule");
}

// The same of those that step, with what else they are told.
auto BoundStep() {
  return Bound()
      .Attr<bool>("nesterov")
      .Attr<bool>("third")
      .Attr<bool>("as_update")
      .Attr<int64_t>("landing");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AdamjaxStep, Impl,
                              BoundStep()
                                  .Attr<bool>("coupled")
                                  .Attr<bool>("decays")
                                  .Attr<ffi::Span<const int64_t>>("whole")
                                  .Attr<ffi::Span<const int64_t>>("bits")
                                  .Attr<ffi::Span<const int64_t>>("block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(AdamjaxGroup, Group,
                              BoundStep()
                                  .Attr<ffi::Span<const int64_t>>("coupled")
                                  .Attr<ffi::Span<const int64_t>>("decays"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(AdamjaxSum, Sum,
                              Bound()
                                  .Attr<ffi::Span<const int64_t>>("whole")
                                  .Attr<ffi::Span<const int64_t>>("bits")
                                  .Attr<ffi::Span<const int64_t>>("block"));
