// One Adam step of one array, in one pass over memory. The step is that of ../_adam.py, the formats are those of
// ../storage.py and ../_stochastic.py; _leaf.py makes the operands.
//
// Arithmetic is in float32. Tiles of all arrays are brought into float32 in the cache, stepped there, and written back:
// so a format is one loop that loads and one that stores, whatever the others are.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kTile = 128;        // numbers of each array that are stepped at a time
constexpr int64_t kAhead = 512;       // how many numbers before they are needed they are asked for
constexpr int64_t kTask = 32 * 1024;  // numbers that a thread takes at a time
constexpr int64_t kLine = 64;         // bytes that come at a time

// One row of the first operand.
struct Scalars {
  float keep1, a1, undo1;      // m <- keep1 m + a1 (g - undo1 m)
  float of_m, of_g;            // the mean that is divided: of_m m + of_g g, bias corrections included
  float keep2, a2, undo2;      // v <- keep2 v + a2 (g^2 - undo2 v)
  float by_c2, eps_root, eps;  // what it is divided by: sqrt(v by_c2 + eps_root) + eps
  float sign, coupled;         // g <- sign g + coupled p
  float rate, decay;           // p <- p + rate (m / v) + decay p
  float kept_by_c2;            // the maximum is taken of v times this, which is 1 unless it is taken of corrected ones
};
constexpr int64_t kScalars = sizeof(Scalars) / sizeof(float);

// One row of the second operand, before the offsets.
struct Dithers {
  uint32_t seed1, turn1, seed2, turn2;
};
constexpr int64_t kDithers = sizeof(Dithers) / sizeof(uint32_t);

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

struct BFloat16 {
  static constexpr uint32_t kLowest = 8, kDigits = 7;  // see _stochastic.spacing
  static constexpr bool kSaturates = false;
  static constexpr float kLargest = 0;
  uint16_t bits;

  operator float() const { return Number(uint32_t{bits} << 16); }
  static BFloat16 Nearest(float x) {  // ties to even; what is no number stays none
    uint32_t b = Bits(x);
    uint32_t rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : (b >> 16) | 0x40)};
  }
};

#if defined(__FLT16_MAX__)
struct Float16 {
  static constexpr uint32_t kLowest = 113, kDigits = 10;
  static constexpr bool kSaturates = true;
  static constexpr float kLargest = 65504;
  _Float16 x;

  operator float() const { return x; }
  static Float16 Nearest(float x) { return {static_cast<_Float16>(x)}; }
};
#endif

// Bring numbers into the cache as float32.
template <class T>
void Load(int64_t n, const void* from, float* __restrict__ to) {
  const T* x = static_cast<const T*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = x[i];
}

template <class T>
void StoreNearest(int64_t n, const float* __restrict__ x, void* to) {
  T* out = static_cast<T*>(to);
  for (int64_t i = 0; i < n; ++i) out[i] = T::Nearest(x[i]);
}

template <class T>
float Saturated(float x) {
  if (!T::kSaturates) return x;
  return std::fabs(x) <= T::kLargest || !(std::fabs(x) < INFINITY) ? x : std::copysign(T::kLargest, x);
}

// The smallest number instead of 0 where x is above 0.
template <class T>
float KeptPositive(float x, float rounded) {
  const float smallest = Number((T::kLowest - T::kDigits) << 23);
  return x > 0 && rounded < smallest ? smallest : rounded;
}

uint32_t Hash(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// One of the two neighbours, on average the number itself. `first` is the index of the first number.
template <class T, bool kPositive>
void StoreByUnits(int64_t n, const float* __restrict__ x, void* to, uint32_t first, uint32_t seed, uint32_t turn) {
  T* out = static_cast<T*>(to);
  for (int64_t i = 0; i < n; ++i) {
    float y = Saturated<T>(x[i]);
    uint32_t exponent = (Bits(y) >> 23) & 0xFF;
    exponent = (exponent < T::kLowest ? T::kLowest : exponent) - T::kDigits;
    float spacing = Number(exponent << 23), by_spacing = Number((254 - exponent) << 23);
    float units = y * by_spacing, whole = std::floor(units);
    uint32_t random = Hash((first + static_cast<uint32_t>(i)) ^ seed) + turn;
    float uniform = static_cast<float>(static_cast<int32_t>(random >> 8)) * 0x1p-24f;
    float rounded = (whole + (uniform < units - whole ? 1.0f : 0.0f)) * spacing;
    if (kPositive) rounded = KeptPositive<T>(x[i], rounded);
    out[i] = T::Nearest(rounded);
  }
}

// The same by the bits: what is cut off is added to the random number, and the carry rounds up.
void StoreBits(int64_t n, const float* __restrict__ x, uint16_t* __restrict__ out, uint32_t first, uint32_t seed,
               uint32_t turn) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = Bits(x[i]);
    uint32_t random = (Hash((first + static_cast<uint32_t>(i)) ^ seed) + turn) >> 16;
    uint32_t up = random ^ (~static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) & 0xFFFF);
    bool is_number = (bits & 0x7FFFFFFF) <= 0x7F800000;
    out[i] = static_cast<uint16_t>((is_number ? bits + up : bits | 0x400000) >> 16);
  }
}

// Whether bfloat16 is no longer finer there than it can be, so that the bits do not tell the neighbours.
bool AnySmall(int64_t n, const float* x) {
  uint32_t any = 0;
  for (int64_t i = 0; i < n; ++i) any |= (Bits(x[i]) & 0x7FFFFFFF) - 1 < (BFloat16::kLowest << 23) - 1;
  return any;
}

template <class T, bool kPositive>
void StoreStochastically(int64_t n, const float* x, void* to, uint32_t first, uint32_t seed, uint32_t turn) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (!AnySmall(n, x)) return StoreBits(n, x, static_cast<uint16_t*>(to), first, seed, turn);
  }
  StoreByUnits<T, kPositive>(n, x, to, first, seed, turn);
}

template <class T>
void StoreGrowing(int64_t n, const float* __restrict__ x, void* to) {
  T* out = static_cast<T*>(to);
  for (int64_t i = 0; i < n; ++i) {
    T rounded = T::Nearest(Saturated<T>(x[i]));
    out[i] = T::Nearest(KeptPositive<T>(x[i], rounded));
  }
}

// What is done with the format of an array: without a loader, it is float32 and used where it is.
struct Format {
  int64_t bytes;
  void (*load)(int64_t, const void*, float*);
  void (*nearest)(int64_t, const float*, void*);
  void (*signed_)(int64_t, const float*, void*, uint32_t, uint32_t, uint32_t);
  void (*decaying)(int64_t, const float*, void*, uint32_t, uint32_t, uint32_t);
  void (*growing)(int64_t, const float*, void*);
};

template <class T>
Format FormatOf() {
  return {2, Load<T>, StoreNearest<T>, StoreStochastically<T, false>, StoreStochastically<T, true>, StoreGrowing<T>};
}

bool Find(ffi::DataType type, Format* found) {
  if (type == ffi::F32) {
    *found = {4, nullptr, nullptr, nullptr, nullptr, nullptr};
  } else if (type == ffi::BF16) {
    *found = FormatOf<BFloat16>();
#if defined(__FLT16_MAX__)
  } else if (type == ffi::F16) {
    *found = FormatOf<Float16>();
#endif
  } else {
    return false;
  }
  return true;
}

// The step of a tile, in float32. Of parameters that are narrower, the update is not added yet, but left in `u`.
template <bool kNarrow, bool kNesterov, bool kMaximum, bool kCoupled, bool kDecays>
void Step(int64_t n, const Scalars& s, float* __restrict__ p, const float* __restrict__ g, float* __restrict__ m,
          float* __restrict__ v, float* __restrict__ top, float* __restrict__ u) {
  for (int64_t i = 0; i < n; ++i) {
    float x = s.sign * g[i];
    if (kCoupled) x += s.coupled * p[i];
    float mean = s.keep1 * m[i] + s.a1 * (x - s.undo1 * m[i]);
    float square = s.keep2 * v[i] + s.a2 * (x * x - s.undo2 * v[i]);
    float largest = square;
    m[i] = mean;
    v[i] = square;
    if (kMaximum) {
      largest = square * s.kept_by_c2;
      // A number that is none stays none, as in jnp.maximum.
      largest = top[i] > largest || top[i] != top[i] ? top[i] : largest;
      top[i] = largest;
    }
    float direction = s.of_m * mean;
    if (kNesterov) direction += s.of_g * x;
    direction /= std::sqrt(largest * s.by_c2 + s.eps_root) + s.eps;
    float update = s.rate * direction;
    if (kDecays) update += s.decay * p[i];
    if (kNarrow) {
      u[i] = update;
    } else {
      p[i] += update;
    }
  }
}

using Stepper = void (*)(int64_t, const Scalars&, float*, const float*, float*, float*, float*, float*);

template <bool... chosen>
Stepper Choose() {
  return Step<chosen...>;
}

template <bool... chosen, class... Rest>
Stepper Choose(bool next, Rest... rest) {
  return next ? Choose<chosen..., true>(rest...) : Choose<chosen..., false>(rest...);
}

void Add(int64_t n, float* __restrict__ p, const float* __restrict__ u) {
  for (int64_t i = 0; i < n; ++i) p[i] += u[i];
}

struct Array {
  Format format;
  const char* in = nullptr;
  char* out = nullptr;

  // The tile at `at` as float32: in `buffer`, or where it is, which is also where it is to be left.
  float* Bring(int64_t at, int64_t n, float* buffer) const {
    if (format.load != nullptr) {
      format.load(n, in + at * format.bytes, buffer);
      return buffer;
    }
    if (out != nullptr && out != in) std::memcpy(out + at * 4, in + at * 4, n * 4);
    return reinterpret_cast<float*>(out != nullptr ? out : const_cast<char*>(in)) + at;
  }

  void Prefetch(int64_t at, int64_t n) const {
    const char* from = in + at * format.bytes;
    for (int64_t i = 0; i < n * format.bytes; i += kLine) {
      out == nullptr ? __builtin_prefetch(from + i, 0) : __builtin_prefetch(from + i, 1);
    }
  }
};

// Where numbers are in the whole array, of which a device may have a part: their random numbers depend on it.
struct Place {
  std::vector<int64_t> shape, whole;
  const uint32_t* offsets;
  bool is_one_run;

  // The index of a number, and how many come that follow it there.
  uint32_t Index(int64_t at, int64_t* run) const {
    if (is_one_run) {
      *run = INT64_MAX;
      return static_cast<uint32_t>(at);
    }
    uint32_t index = 0, unit = 1;
    *run = shape.back() - at % shape.back();
    for (size_t axis = shape.size(); axis-- > 0; at /= shape[axis]) {
      index += unit * (offsets[axis] + static_cast<uint32_t>(at % shape[axis]));
      unit *= static_cast<uint32_t>(whole[axis]);
    }
    return index;
  }
};

// As XLA does: numbers below the smallest normal one count as 0.
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

// Call `task` with 0, ..., count - 1 from XLA's threads and this one. It waits for nothing that has not begun: that
// might wait for this thread.
void Parallel(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& task) {
  auto progress = std::make_shared<Progress>();
  std::function<void()> work = [progress, count, task] {
    Flushing flushing;
    int64_t mine = 0;
    for (int64_t i; (i = progress->next.fetch_add(1)) < count; ++mine) task(i);
    if (mine > 0 && progress->done.fetch_add(mine) + mine == count) {
      std::lock_guard<std::mutex> lock(progress->mutex);
      progress->finished.notify_all();
    }
  };
  for (int64_t i = 1; i < std::min<int64_t>(pool.num_threads(), count); ++i) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->finished.wait(lock, [&] { return progress->done.load() == count; });
}

struct Job {
  Stepper step;
  Array p, g, m, v, top;
  bool maximum;
  Place place;

  void Run(int64_t begin, int64_t end, const Scalars& s, const Dithers& d) const {
    alignas(64) float buffers[6][kTile];
    for (int64_t n, at = begin; at < end; at += n) {
      int64_t run;
      uint32_t index = place.Index(at, &run);
      n = std::min({kTile, end - at, run});
      for (const Array* x : {&p, &g, &m, &v}) x->Prefetch(at + kAhead, n);
      float* ps = p.Bring(at, n, buffers[0]);
      float* ms = m.Bring(at, n, buffers[2]);
      float* vs = v.Bring(at, n, buffers[3]);
      float* tops = maximum ? top.Bring(at, n, buffers[4]) : nullptr;
      step(n, s, ps, g.Bring(at, n, buffers[1]), ms, vs, tops, buffers[5]);
      if (p.format.nearest != nullptr) {  // the update is rounded before it is added
        alignas(64) char rounded[kTile * 2];
        p.format.nearest(n, buffers[5], rounded);
        p.format.load(n, rounded, buffers[5]);
        Add(n, ps, buffers[5]);
        p.format.nearest(n, ps, p.out + at * p.format.bytes);
      }
      if (m.format.signed_ != nullptr) {
        m.format.signed_(n, ms, m.out + at * m.format.bytes, index, d.seed1, d.turn1);
      }
      if (v.format.decaying != nullptr) {
        v.format.decaying(n, vs, v.out + at * v.format.bytes, index, d.seed2, d.turn2);
      }
      if (maximum && top.format.growing != nullptr) top.format.growing(n, tops, top.out + at * top.format.bytes);
    }
  }
};

ffi::Error Impl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> scalars, ffi::Buffer<ffi::U32> dithers,
                ffi::RemainingArgs arrays, ffi::RemainingRets results, bool nesterov, bool maximum, bool coupled, bool decays,
                ffi::Span<const int64_t> whole) {
  size_t count = maximum ? 5 : 4;
  if (arrays.size() != count || results.size() != count - 1) {
    return ffi::Error::InvalidArgument("adamjax: wrong number of arrays");
  }
  Job job;
  job.maximum = maximum;
  Array* const places[] = {&job.p, &job.g, &job.m, &job.v, &job.top};
  int64_t size = -1;
  for (size_t i = 0, o = 0; i < count; ++i) {
    auto in = arrays.get<ffi::AnyBuffer>(i);
    if (!in.has_value()) return ffi::Error::InvalidArgument("adamjax: an array is missing");
    if (!Find(in->element_type(), &places[i]->format)) return ffi::Error::InvalidArgument("adamjax: unknown dtype");
    if (size >= 0 && static_cast<int64_t>(in->element_count()) != size) {
      return ffi::Error::InvalidArgument("adamjax: arrays of different sizes");
    }
    size = in->element_count();
    places[i]->in = static_cast<const char*>(in->untyped_data());
    if (i == 1) continue;
    auto out = results.get<ffi::AnyBuffer>(o++);
    if (!out.has_value() || (*out)->element_type() != in->element_type() ||
        static_cast<int64_t>((*out)->element_count()) != size) {
      return ffi::Error::InvalidArgument("adamjax: a result is not like its argument");
    }
    places[i]->out = static_cast<char*>((*out)->untyped_data());
  }
  job.step = Choose<>(job.p.format.nearest != nullptr, nesterov, maximum, coupled, decays);
  int64_t axes = whole.size(), width = kDithers + axes;
  int64_t batch = scalars.element_count() / kScalars;
  if (static_cast<int64_t>(scalars.element_count()) != batch * kScalars ||
      static_cast<int64_t>(dithers.element_count()) != batch * width || batch == 0 || size % batch != 0) {
    return ffi::Error::InvalidArgument("adamjax: scalars of the wrong shape");
  }
  auto shape = arrays.get<ffi::AnyBuffer>(0)->dimensions();
  job.place.shape.assign(shape.end() - axes, shape.end());
  job.place.whole.assign(whole.begin(), whole.end());
  bool rounds = job.m.format.signed_ != nullptr || job.v.format.decaying != nullptr;
  job.place.is_one_run = !rounds || job.place.shape == job.place.whole;
  int64_t row = size / batch, tasks = (row + kTask - 1) / kTask;
  const float* all_scalars = scalars.typed_data();
  const uint32_t* all_dithers = dithers.typed_data();
  Parallel(pool, batch * tasks, [&](int64_t task) {
    int64_t b = task / tasks, begin = task % tasks * kTask;
    Scalars s;
    Dithers d;
    std::memcpy(&s, all_scalars + b * kScalars, sizeof(s));
    std::memcpy(&d, all_dithers + b * width, sizeof(d));
    Job mine = job;
    mine.place.offsets = all_dithers + b * width + kDithers;
    for (Array* x : {&mine.p, &mine.g, &mine.m, &mine.v, &mine.top}) {
      x->in += b * row * x->format.bytes;
      if (x->out != nullptr) x->out += b * row * x->format.bytes;
    }
    mine.Run(begin, std::min(row, begin + kTask), s, d);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AdamjaxStep, Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("nesterov")
                                  .Attr<bool>("maximum")
                                  .Attr<bool>("coupled")
                                  .Attr<bool>("decays")
                                  .Attr<ffi::Span<const int64_t>>("whole"));
