// The loops over values, for the instruction set of the file that includes this: it defines W, the width of a vector in
// bytes, and FIND, the name of the function that native.cpp calls.
//
// A kernel K is Forward or Backward of one dtype. K::terms returns the two terms that a value adds to its channel's sums;
// K::store writes the results. Loops visit the values in one of two orders: planes, where a channel of a sample is
// contiguous (contiguous tensors), and rows, where the channels of a position are (channels last, and (N, C)).

#include "native_channels.h"

namespace batchnorm {
namespace {

template <class A> struct VectorTypes;
template <> struct VectorTypes<float> {
    typedef float vector __attribute__((vector_size(W)));
    typedef int32_t bits __attribute__((vector_size(W)));
    typedef uint8_t bytes __attribute__((vector_size(W / 4)));
};
template <> struct VectorTypes<double> {
    typedef double vector __attribute__((vector_size(W)));
    typedef int64_t bits __attribute__((vector_size(W)));
    typedef uint8_t bytes __attribute__((vector_size(W / 8)));
};
template <class A> using Vector = typename VectorTypes<A>::vector;
template <class A> using Bits = typename VectorTypes<A>::bits;
template <class A> using Integer = decltype(Bits<A>{}[0] + 0);
template <class A> constexpr int64_t lanes = W / sizeof(A);

template <class A> INLINE Vector<A> splat(A value) { return Vector<A>{} + value; }
template <class A> INLINE Vector<A> keep(Vector<A> values, Bits<A> where) {
    return cast<Vector<A>>(cast<Bits<A>>(values) & where);
}
template <class A> INLINE Vector<A> choose(Bits<A> where, Vector<A> yes, Vector<A> no) {
    return cast<Vector<A>>((cast<Bits<A>>(yes) & where) | (cast<Bits<A>>(no) & ~where));
}
template <class A> INLINE Vector<A> table_at(const A *table) {
    Vector<A> values;
    memcpy(&values, table, W);
    return values;
}
INLINE Vector<float> load_vector(const float *from) { return table_at(from); }
INLINE Vector<double> load_vector(const double *from) { return table_at(from); }

// A pair of vectors on which the same operations are done. bfloat16 values are loaded in pairs where possible: of each 32
// bits the lower half is a value of the first vector, the upper half one of the second, so no value changes its lane.
struct Two {
    Vector<float> a, b;
};
struct TwoBits {
    Bits<float> a, b;
};
INLINE Two operator-(Two x, Vector<float> y) { return {x.a - y, x.b - y}; }
INLINE Two operator+(Two x, Vector<float> y) { return {x.a + y, x.b + y}; }
INLINE Two operator*(Two x, Vector<float> y) { return {x.a * y, x.b * y}; }
INLINE Two operator-(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
INLINE Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
INLINE Two operator*(Two x, Two y) { return {x.a * y.a, x.b * y.b}; }
template <class V> INLINE auto below_zero(V x) { return x < V{}; }
template <class V> INLINE auto above_zero(V x) { return x > V{}; }
INLINE TwoBits below_zero(Two x) { return {below_zero(x.a), below_zero(x.b)}; }
INLINE TwoBits above_zero(Two x) { return {above_zero(x.a), above_zero(x.b)}; }
template <class A> INLINE Vector<A> drop(Vector<A> values, Bits<A> where) { return keep<A>(values, ~where); }
template <class A> INLINE Two keep(Two x, TwoBits where) { return {keep<A>(x.a, where.a), keep<A>(x.b, where.b)}; }
template <class A> INLINE Two keep(Two x, Bits<A> where) { return {keep<A>(x.a, where), keep<A>(x.b, where)}; }
template <class A> INLINE Two drop(Two x, TwoBits where) { return {drop<A>(x.a, where.a), drop<A>(x.b, where.b)}; }
template <class A> INLINE Two choose(TwoBits where, Two yes, Two no) {
    return {choose<A>(where.a, yes.a, no.a), choose<A>(where.b, yes.b, no.b)};
}

// Half precision has 16 bits in memory and 32 in the arithmetic. The conversions are those of native.h, in each lane.
typedef uint32_t Words __attribute__((vector_size(W)));
typedef uint16_t Halves __attribute__((vector_size(W / 2)));
template <class H> INLINE Vector<float> widen(const H *from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
#if defined(WIDEN)
    const Words words = cast<Words>(WIDEN(halves));  // one instruction; GCC compiles the conversion below to four
#else
    const Words words = __builtin_convertvector(halves, Words);
#endif
    return cast<Vector<float>>(H::template to_float_bits<Words, Vector<float>>(words));
}
INLINE Vector<float> load_vector(const BFloat16 *from) {
#if defined(WIDEN_UP)
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return cast<Vector<float>>(WIDEN_UP(halves));
#else
    return widen(from);
#endif
}
INLINE Vector<float> load_vector(const Half *from) { return widen(from); }

// Stream tells the processor not to keep the line in its cache, for outputs that would not fit in it anyway.
template <bool Stream, class Stored> INLINE void write(void *to, Stored values) {
#if defined(__SSE2__)
    if constexpr (Stream && sizeof(Stored) == 16) return _mm_stream_si128((__m128i *)to, cast<__m128i>(values));
#endif
#if W >= 32
    if constexpr (Stream && sizeof(Stored) == 32) return _mm256_stream_si256((__m256i *)to, cast<__m256i>(values));
#endif
#if W >= 64
    if constexpr (Stream && sizeof(Stored) == 64) return _mm512_stream_si512((__m512i *)to, cast<__m512i>(values));
#endif
    memcpy(to, &values, sizeof values);
}
template <bool Stream> INLINE void store_vector(float *to, Vector<float> values) { write<Stream>(to, values); }
template <bool Stream> INLINE void store_vector(double *to, Vector<double> values) { write<Stream>(to, values); }
template <bool Stream, class H> INLINE void store_vector(H *to, Vector<float> values) {
    Words words = H::template from_float_bits<Words, Vector<float>>(cast<Words>(values));
    write<Stream>(to, __builtin_convertvector(words, Halves));
}
#if defined(NARROW_UP)
template <bool Stream> INLINE void store_vector(BFloat16 *to, Vector<float> values) {
    write<Stream>(to, NARROW_UP(BFloat16::rounded<Words>(cast<Words>(values))));
}
#endif

// The number of values that are loaded or saved: one vector; n values, where there are fewer (other lanes are 0); or two
// vectors.
enum Group : int { ONE, PART, PAIR };
template <int G, class T> INLINE auto load(const T *from, int64_t n) {
    if constexpr (G == PAIR) {
        Words words;
        memcpy(&words, from, sizeof words);
        return Two{cast<Vector<float>>(words << 16), cast<Vector<float>>(words & 0xffff0000u)};
    } else if constexpr (G == ONE) {
        return load_vector(from);
    } else {
        T whole[lanes<Arithmetic<T>>] = {};
        for (int64_t i = 0; i < n; ++i) whole[i] = from[i];
        return load_vector(whole);
    }
}
template <int G, bool Stream, class T, class V> INLINE void save(T *to, V values, int64_t n) {
    if constexpr (G == PAIR) {
        const Words low = BFloat16::rounded<Words>(cast<Words>(values.a)) >> 16;
        write<Stream>(to, low | (BFloat16::rounded<Words>(cast<Words>(values.b)) & 0xffff0000u));
    } else if constexpr (G == ONE) {
        store_vector<Stream>(to, values);
    } else {
        T whole[lanes<Arithmetic<T>>];
        store_vector<false>(whole, values);
        for (int64_t i = 0; i < n; ++i) to[i] = whole[i];
    }
}
template <class A> INLINE Bits<A> lanes_from(int64_t first, int64_t end) {
    Bits<A> lane;
    for (int64_t i = 0; i < lanes<A>; ++i) lane[i] = i;
    const Bits<A> from = Bits<A>{} + (Integer<A>)first, to = Bits<A>{} + (Integer<A>)end;
    return (lane >= from) & (lane < to);
}
template <bool Part, class A> INLINE Bits<A> load_mask(const uint8_t *mask, int64_t n) {
    typename VectorTypes<A>::bytes bytes = {};
    if (Part)
        for (int64_t i = 0; i < n; ++i) bytes[i] = mask[i];
    else
        memcpy(&bytes, mask, sizeof bytes);
    return __builtin_convertvector(bytes, Bits<A>) != Bits<A>{};
}

// Return the mask n positions on, or null without a mask.
template <bool Mask> INLINE const uint8_t *past(const uint8_t *mask, int64_t n) { return Mask ? mask + n : nullptr; }

template <class A> struct Parameters {
    Vector<A> mean, gain, shift, slope, level;
};
template <class A> INLINE Parameters<A> channel_parameters(const Tables<A> &t, int64_t c) {
    return {splat(t.mean[c]), splat(t.gain[c]), splat(t.shift[c]), splat(t.slope[c]), splat(t.level[c])};
}
template <bool Part, class A> INLINE Parameters<A> vector_parameters(const Tables<A> &t, int64_t c, int64_t n) {
    return {load<Part>(t.mean + c, n), load<Part>(t.gain + c, n), load<Part>(t.shift + c, n),
            load<Part>(t.slope + c, n), load<Part>(t.level + c, n)};
}

// A kernel has its pointers by value, so that the compiler knows that no write to memory changes them.
// Residual: 0 for none, 1 for present, 2 if known only at run time. Act: an Activation, or RUNTIME.
template <class T> struct Paired { static constexpr bool value = false; };
template <> struct Paired<BFloat16> { static constexpr bool value = true; };
template <class T, int Residual, int Act> struct Kernel {
    static constexpr bool specialized = Act != RUNTIME, paired = specialized && Paired<T>::value;
    using Value = T;
    using A = Arithmetic<T>;
    using V = Vector<A>;
    const T *x, *other, *dy;
    T *out, *dresidual;
    int64_t activation, width, prefetch_bytes;
    Bits<A> batch_statistics;  // all ones or all zeros

    INLINE void read(const Job &job) {
        const Call &call = *job.call;
        x = (const T *)call.x;
        other = (const T *)call.other;
        dy = (const T *)call.dy;
        out = (T *)call.out;
        dresidual = (T *)call.dresidual;
        activation = call.activation;
        width = job.width;
        prefetch_bytes = job.prefetch_bytes;
        batch_statistics = Bits<A>{} - (Integer<A>)(call.batch_statistics != 0);
    }
    // Memory is fastest when it is read and written at the same time, so with each line that is written a later line is
    // prefetched: of the next unit in planes, a few rows on in rows. It goes to the second-level cache, as the first is
    // too small.
    INLINE void prefetch_ahead(int64_t at) const {
        __builtin_prefetch((const char *)(x + at) + prefetch_bytes, 0, 2);
        if (dy) __builtin_prefetch((const char *)(dy + at) + prefetch_bytes, 0, 2);
        if (Residual != 0) __builtin_prefetch((const char *)(other + at) + prefetch_bytes, 0, 2);
    }
    // Prefetch n values of which no store has prefetched a line.
    INLINE void prefetch(int64_t at, int64_t n) const {
        for (int64_t i = at; i < at + n; i += 64 / (int64_t)sizeof(T)) {
            __builtin_prefetch(x + i, 0, 2);
            if (dy) __builtin_prefetch(dy + i, 0, 2);
            if (Residual != 0 && other) __builtin_prefetch(other + i, 0, 2);
        }
    }
    INLINE bool is(int64_t which) const { return Act == RUNTIME ? activation == which : Act == which; }
    INLINE bool has_other() const {
        if constexpr (Residual == 2)
            return other != nullptr;
        else
            return Residual == 1;
    }
};

template <class A, bool Mask, class L> INLINE L apply_mask(L values, Bits<A> where) {
    if constexpr (Mask)
        return keep<A>(values, where);
    else
        return values;
}

template <class T, int Residual, int Act> struct Forward : Kernel<T, Residual, Act> {
    using Base = Kernel<T, Residual, Act>;
    using typename Base::A;

    template <int G, class L> INLINE void terms(const Parameters<A> &p, int64_t at, int64_t n, L &a, L &b) const {
        a = load<G>(this->x + at, n) - p.mean;
        b = a * a;
    }
    template <int G, bool Stream, bool Mask>
    INLINE void store(const Parameters<A> &p, int64_t at, int64_t n, Bits<A> where) const {
        auto z = (load<G>(this->x + at, n) - p.mean) * p.gain + p.shift;
        if (this->has_other()) z = z + load<G>(this->other + at, n);
        // NaN is not below 0, and so it is kept.
        if (this->is(RELU)) z = drop<A>(z, below_zero(z));
        if (this->is(LEAKY_RELU)) z = choose<A>(below_zero(z), z * splat((A)LEAKY_SLOPE), z);
        save<G, Stream>(this->out + at, apply_mask<A, Mask>(z, where), n);
    }
};

template <class T, int Residual, int Act> struct Backward : Kernel<T, Residual, Act> {
    using Base = Kernel<T, Residual, Act>;
    using typename Base::A;

    // Return the gradient of the activation's argument, and set d to x - mean.
    template <int G, class L> INLINE L argument(const Parameters<A> &p, int64_t at, int64_t n, L &d) const {
        const L dy = load<G>(this->dy + at, n);
        d = load<G>(this->x + at, n) - p.mean;
        if (this->is(NONE)) return dy;
        const L z = this->has_other() ? load<G>(this->other + at, n) : d * p.gain + p.shift;
        return this->is(RELU) ? keep<A>(dy, above_zero(z))
                              : choose<A>(above_zero(z), dy, dy * splat((A)LEAKY_SLOPE));
    }
    template <int G, class L> INLINE void terms(const Parameters<A> &p, int64_t at, int64_t n, L &a, L &b) const {
        L d;
        a = argument<G>(p, at, n, d);
        b = a * d;
    }
    template <int G, bool Stream, bool Mask>
    INLINE void store(const Parameters<A> &p, int64_t at, int64_t n, Bits<A> where) const {
        decltype(load<G>(this->x, n)) d;
        const auto dz = argument<G>(p, at, n, d);
        // Without a branch there is one way to fuse product and sum; otherwise rounding would depend on the position.
        const auto dx = dz * p.gain - keep<A>(d * p.slope + p.level, this->batch_statistics);
        if (this->out) save<G, Stream>(this->out + at, apply_mask<A, Mask>(dx, where), n);
        if (Residual != 0 && this->dresidual) save<G, Stream>(this->dresidual + at, apply_mask<A, Mask>(dz, where), n);
    }
};

// The sums of a channel. Float lanes are flushed into doubles after a limited number of values, so that the error does not
// grow with the batch.
template <class A> struct Sums {
    Vector<A> a, b;
    double first, second;
    int64_t pending;
};
constexpr int64_t MAX_PENDING = 4096;
template <class A> INLINE void flush(Sums<A> &sums) {
    for (int64_t i = 0; i < lanes<A>; ++i) {
        sums.first += (double)sums.a[i];
        sums.second += (double)sums.b[i];
    }
    sums.a = sums.b = Vector<A>{};
    sums.pending = 0;
}

template <class K, bool Mask, bool Part>
INLINE void sum_step(const K &k, const Parameters<typename K::A> &p, int64_t at, const uint8_t *mask, int64_t n,
                     bool all, Bits<typename K::A> which, Vector<typename K::A> &a, Vector<typename K::A> &b) {
    using A = typename K::A;
    Vector<A> first, second;
    k.template terms<Part>(p, at, n, first, second);
    if (Mask) which = all ? load_mask<Part, A>(mask, n) : which & load_mask<Part, A>(mask, n);
    if (Mask || !all) {
        first = keep<A>(first, which);
        second = keep<A>(second, which);
    }
    a += first;
    b += second;
}
// Runs shorter than a vector are rare, and so not inlined.
template <class K, bool Mask>
__attribute__((noinline)) void sum_short(const K k, const Parameters<typename K::A> &p, int64_t at,
                                         const uint8_t *mask, int64_t n, Sums<typename K::A> &sums) {
    using A = typename K::A;
    sum_step<K, Mask, true>(k, p, at, mask, n, false, lanes_from<A>(0, n), sums.a, sums.b);
}
template <class K, bool Mask>
__attribute__((noinline)) void store_short(const K k, const Parameters<typename K::A> &p, int64_t at,
                                         const uint8_t *mask, int64_t n) {
    using A = typename K::A;
    k.template store<true, false, Mask>(p, at, n, Mask ? load_mask<true, A>(mask, n) : Bits<A>{});
}
template <class K, bool Mask>
INLINE void sum_run(const K &k, const Parameters<typename K::A> &p, int64_t at, const uint8_t *mask, int64_t n,
                    Bits<typename K::A> last, Sums<typename K::A> &sums) {
    using A = typename K::A;
    constexpr int64_t step = lanes<A>;
    const Bits<A> any = {};
    int64_t i = 0;
    if (n < step) {
        sum_short<K, Mask>(k, p, at, mask, n, sums);
    } else {
        Vector<A> a1{}, b1{}, a2{}, b2{}, a3{}, b3{};
        if constexpr (K::paired) {
            Two even_a{}, even_b{}, odd_a{}, odd_b{}, first, second;
            for (; i + 4 * step <= n; i += 4 * step) {
                k.template terms<PAIR>(p, at + i, step, first, second);
                even_a = even_a + first;
                even_b = even_b + second;
                k.template terms<PAIR>(p, at + i + 2 * step, step, first, second);
                odd_a = odd_a + first;
                odd_b = odd_b + second;
            }
            sums.a += odd_a.a + odd_a.b;
            sums.b += odd_b.a + odd_b.b;
            a1 = even_a.a;
            a2 = even_a.b;
            b1 = even_b.a;
            b2 = even_b.b;
        }
        for (; K::specialized && i + 4 * step <= n; i += 4 * step) {
            sum_step<K, Mask, false>(k, p, at + i, past<Mask>(mask, i), step, true, any, sums.a, sums.b);
            sum_step<K, Mask, false>(k, p, at + i + step, past<Mask>(mask, i + step), step, true, any, a1, b1);
            sum_step<K, Mask, false>(k, p, at + i + 2 * step, past<Mask>(mask, i + 2 * step), step, true, any, a2, b2);
            sum_step<K, Mask, false>(k, p, at + i + 3 * step, past<Mask>(mask, i + 3 * step), step, true, any, a3, b3);
        }
        for (; i + step <= n; i += step)
            sum_step<K, Mask, false>(k, p, at + i, past<Mask>(mask, i), step, true, any, a1, b1);
        if (i < n)  // the last whole vector, of which only the lanes that are not summed yet count
            sum_step<K, Mask, false>(k, p, at + n - step, past<Mask>(mask, n - step), step, false, last, a2, b2);
        sums.a += (a1 + a2) + a3;
        sums.b += (b1 + b2) + b3;
    }
    sums.pending += n;
    if (sums.pending >= MAX_PENDING) flush(sums);
}
template <class K, bool Stream, bool Mask>
INLINE void store_run(const K &k, const Parameters<typename K::A> &p, int64_t at, const uint8_t *mask, int64_t n) {
    using A = typename K::A;
    using T = typename K::Value;
    constexpr int64_t step = lanes<A>;
    const Bits<A> any = {};
    if (n < step) return store_short<K, Mask>(k, p, at, mask, n);
    int64_t i = 0;
    if (Stream) {  // whole cache lines, which begin at multiples of 64 bytes
        k.prefetch_ahead(at);
        k.prefetch_ahead(at + n - 1);
        const int64_t head = (-(intptr_t)(k.out + at) & 63) / (int64_t)sizeof(T);
        for (; i < head && i < n; i += step)
            store_short<K, Mask>(k, p, at + i, mask, (head < n ? head : n) - i < step ? (head < n ? head : n) - i : step);
        if (head < i) i = head;
    }
    if constexpr (K::paired)
        for (; i + 2 * step <= n; i += 2 * step) {
            if (Stream) k.prefetch_ahead(at + i);
            k.template store<PAIR, Stream, false>(p, at + i, step, any);
        }
    for (; i + step <= n; i += step) {
        if (Stream) k.prefetch_ahead(at + i);
        k.template store<false, Stream, Mask>(p, at + i, step, Mask ? load_mask<false, A>(mask + i, step) : any);
    }
    if (i < n)
        k.template store<false, false, Mask>(p, at + n - step, step,
                                            Mask ? load_mask<false, A>(mask + n - step, step) : any);
}

// Planes: channels [c0, c1) at positions [p0, p1); a position is sample * length + the offset in the channel.
template <class K, bool Mask>
INLINE void sum_planes(const Job &job, const Unit &u) {
    K k;
    k.read(job);
    using A = typename K::A;
    const Tables<A> &t = tables<A>(job);
    const int64_t length = job.call->length, channels = job.call->channels;
    Sums<A> sums[CHANNELS_AT_ONCE] = {};
    for (int64_t n = u.p0 / length; n * length < u.p1; ++n) {
        const int64_t from = u.p0 > n * length ? u.p0 - n * length : 0;
        const int64_t to = u.p1 < (n + 1) * length ? u.p1 - n * length : length;
        const Bits<A> last = lanes_from<A>(lanes<A> - (to - from) % lanes<A>, lanes<A>);
        if (job.prefetches) k.prefetch(((n + 1) * channels + u.c0) * length + from, (u.c1 - u.c0) * length);
        for (int64_t c = u.c0; c < u.c1; ++c)
            for (int64_t i = from; i < to; i += MAX_PENDING)
                sum_run<K, Mask>(k, channel_parameters(t, c), (n * channels + c) * length + i,
                                 Mask ? job.call->mask + n * length + i : nullptr,
                                 to - i < MAX_PENDING ? to - i : MAX_PENDING, last,
                                 sums[c - u.c0]);
    }
    for (int64_t c = u.c0; c < u.c1; ++c) {
        flush(sums[c - u.c0]);
        job.first[u.split * job.width + c] = sums[c - u.c0].first;
        job.second[u.split * job.width + c] = sums[c - u.c0].second;
    }
}
template <class K, bool Stream, bool Mask>
INLINE void store_planes(const Job &job, const Unit &u) {
    K k;
    k.read(job);
    using A = typename K::A;
    const Tables<A> &t = tables<A>(job);
    const int64_t length = job.call->length, channels = job.call->channels;
    for (int64_t n = u.p0 / length; n * length < u.p1; ++n) {
        const int64_t from = u.p0 > n * length ? u.p0 - n * length : 0;
        const int64_t to = u.p1 < (n + 1) * length ? u.p1 - n * length : length;
        for (int64_t c = u.c0; c < u.c1; ++c)
            store_run<K, Stream, Mask>(k, channel_parameters(t, c), (n * channels + c) * length + from,
                                     Mask ? job.call->mask + n * length + from : nullptr, to - from);
    }
}

// Rows: columns [c0, c1) of rows [p0, p1), each job.width values wide. If channels are few, several positions make one
// row, and the tables repeat their channels as many times. Rows are visited in strips, a few vectors of columns down a
// block of rows, so that the numbers per channel and the sums stay in registers.
// A strip has 4 vectors where there are 32 registers (AVX-512), or where fewer vectors would be half a cache line, which
// should be streamed whole (AVX2, values of 16 bits); otherwise it has 2, of 16 registers.
template <class T> constexpr int STRIP = W == 64 || (W == 32 && sizeof(T) == 2) ? 4 : 2;
#define EACH_VECTOR _Pragma("GCC unroll 4") for (int s = 0; s < S; ++s)
template <class K, int S, bool Stream>
INLINE void sum_strip(const K &k, const Tables<typename K::A> &t, int64_t at, int64_t rows, int64_t c,
                      Bits<typename K::A> which, bool all, typename K::A *a, typename K::A *b) {
    using A = typename K::A;
    constexpr int64_t step = lanes<A>;
    Parameters<A> p[S];
    Vector<A> first[S], second[S];
    EACH_VECTOR {
        p[s] = vector_parameters<false>(t, c + s * step, step);
        first[s] = second[s] = Vector<A>{};
    }
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t from = at + row * k.width + c;
        EACH_VECTOR {
            Vector<A> one, other;
            if (Stream && s * step * sizeof(typename K::Value) % 64 == 0) k.prefetch_ahead(from + s * step);
            k.template terms<ONE>(p[s], from + s * step, step, one, other);
            first[s] += one;
            second[s] += other;
        }
    }
    EACH_VECTOR {
        if (!all) {
            first[s] = keep<A>(first[s], which);
            second[s] = keep<A>(second[s], which);
        }
        store_vector<false>(a + s * step, table_at(a + s * step) + first[s]);
        store_vector<false>(b + s * step, table_at(b + s * step) + second[s]);
    }
}
template <class K>
INLINE void sum_narrow(const K &k, const Tables<typename K::A> &t, int64_t at, int64_t rows, int64_t c, int64_t n,
                       typename K::A *a, typename K::A *b) {
    using A = typename K::A;
    const Parameters<A> p = vector_parameters<true>(t, c, n);
    Vector<A> first{}, second{}, one, other;
    for (int64_t row = 0; row < rows; ++row) {
        k.template terms<PART>(p, at + row * k.width + c, n, one, other);
        first += one;
        second += other;
    }
    save<PART, false>(a, load<PART>(a, n) + first, n);
    save<PART, false>(b, load<PART>(b, n) + second, n);
}
template <class K, bool Stream>
INLINE void sum_some_rows(const K &k, const Tables<typename K::A> &t, int64_t at, int64_t rows, int64_t c0, int64_t c1,
                          typename K::A *a, typename K::A *b) {
    using A = typename K::A;
    constexpr int64_t step = lanes<A>;
    const Bits<A> any = {};
    if (c1 - c0 < step) return sum_narrow<K>(k, t, at, rows, c0, c1 - c0, a, b);
    int64_t c = c0;
    constexpr int strip = STRIP<typename K::Value>;
    for (; c + strip * step <= c1; c += strip * step)
        sum_strip<K, strip, Stream>(k, t, at, rows, c, any, true, a + c - c0, b + c - c0);
    for (; c + step <= c1; c += step) sum_strip<K, 1, Stream>(k, t, at, rows, c, any, true, a + c - c0, b + c - c0);
    if (c < c1)  // the last whole vector, of which only the columns that are not summed yet count
        sum_strip<K, 1, false>(k, t, at, rows, c1 - step, lanes_from<A>(step - (c1 - c), step), false, a + c1 - step - c0,
                               b + c1 - step - c0);
}
template <class K>
__attribute__((noinline)) void sum_row(const K k, const Tables<typename K::A> &t, int64_t at, int64_t c0, int64_t c1,
                                       typename K::A *a, typename K::A *b) {
    sum_some_rows<K, false>(k, t, at, 1, c0, c1, a, b);
}
template <class A> INLINE void flush(A *a, A *b, int64_t n, double *first, double *second) {
    CHANNELWISE {
        first[i] += (double)a[i];
        second[i] += (double)b[i];
        a[i] = b[i] = 0;
    }
}
template <class K, bool Stream>
INLINE void sum_rows(const Job &job, const Unit &u) {
    K k;
    k.read(job);
    using A = typename K::A;
    const Tables<A> &t = tables<A>(job);
    const int64_t columns = u.c1 - u.c0, width = k.width;
    double *first = job.first + u.split * width + u.c0, *second = job.second + u.split * width + u.c0;
    A *a = (A *)job.scratch + u.part * 2 * job.widest, *b = a + job.widest;
    memset(first, 0, columns * sizeof(double));
    memset(second, 0, columns * sizeof(double));
    memset(a, 0, columns * sizeof(A));
    memset(b, 0, columns * sizeof(A));
    for (int64_t begin = u.p0; begin < u.p1; begin += ROWS_PER_SUM) {
        const int64_t end = u.p1 - begin < ROWS_PER_SUM ? u.p1 : begin + ROWS_PER_SUM;
        int64_t row = begin;
        if (job.call->mask) {
            for (; row < end; ++row)
                if (job.call->mask[row]) sum_row<K>(k, t, row * width, u.c0, u.c1, a, b);
        } else {
            for (; row < end; row += STRIP_ROWS)
                sum_some_rows<K, Stream>(k, t, row * width, end - row < STRIP_ROWS ? end - row : STRIP_ROWS, u.c0, u.c1, a,
                                         b);
        }
        flush(a, b, columns, first, second);
    }
    if (u.remainder) {  // the positions that do not fill a row
        sum_row<K>(k, t, u.p1 * width, 0, u.remainder, a, b);
        flush(a, b, u.remainder, first, second);
    }
}
template <class K, int S, bool Stream>
INLINE void store_strip(const K &k, const Tables<typename K::A> &t, int64_t at, int64_t rows, int64_t c) {
    using A = typename K::A;
    constexpr int64_t step = lanes<A>;
    const Bits<A> any = {};
    Parameters<A> p[S];
    EACH_VECTOR p[s] = vector_parameters<false>(t, c + s * step, step);
    for (int64_t row = 0; row < rows; ++row)
        EACH_VECTOR {
            const int64_t here = at + row * k.width + c + s * step;
            if (Stream && s * step * sizeof(typename K::Value) % 64 == 0) k.prefetch_ahead(here);
            k.template store<ONE, Stream, false>(p[s], here, step, any);
        }
}
template <class K, bool Stream>
INLINE void store_some_rows(const K &k, const Tables<typename K::A> &t, int64_t at, int64_t rows, int64_t c0, int64_t c1) {
    using A = typename K::A;
    constexpr int64_t step = lanes<A>;
    const Bits<A> any = {};
    if (c1 - c0 < step) {
        const Parameters<A> p = vector_parameters<true>(t, c0, c1 - c0);
        for (int64_t row = 0; row < rows; ++row)
            k.template store<PART, false, false>(p, at + row * k.width + c0, c1 - c0, any);
        return;
    }
    int64_t c = c0;
    constexpr int strip = STRIP<typename K::Value>;
    for (; c + strip * step <= c1; c += strip * step) store_strip<K, strip, Stream>(k, t, at, rows, c);
    for (; c + step <= c1; c += step) store_strip<K, 1, Stream>(k, t, at, rows, c);
    if (c < c1) store_strip<K, 1, false>(k, t, at, rows, c1 - step);
}
template <class K>
__attribute__((noinline)) void store_row(const K k, const Tables<typename K::A> &t, int64_t at, int64_t c0, int64_t c1) {
    store_some_rows<K, false>(k, t, at, 1, c0, c1);
}
template <class K, bool Stream>
INLINE void store_rows(const Job &job, const Unit &u) {
    K k;
    k.read(job);
    using T = typename K::Value;
    const Tables<typename K::A> &t = tables<typename K::A>(job);
    const int64_t width = job.width;
    int64_t row = u.p0;
    if (job.call->mask) {
        for (; row < u.p1; ++row) {
            if (job.call->mask[row]) {
                store_row<K>(k, t, row * width, u.c0, u.c1);
                continue;
            }
            if (job.call->out) memset((T *)job.call->out + row * width + u.c0, 0, (u.c1 - u.c0) * sizeof(T));
            if (job.call->dresidual) memset((T *)job.call->dresidual + row * width + u.c0, 0, (u.c1 - u.c0) * sizeof(T));
        }
        return;
    }
    // Rows are stored from the end, because those that the sums read last are still in the cache.
    for (int64_t end = u.p1; end > u.p0;) {
        const int64_t begin = end - u.p0 < ROWS_PER_SUM ? u.p0 : end - ROWS_PER_SUM;
        for (row = begin; row < end; row += STRIP_ROWS)
            store_some_rows<K, Stream>(k, t, row * width, end - row < STRIP_ROWS ? end - row : STRIP_ROWS, u.c0, u.c1);
        end = begin;
    }
    if (u.remainder) store_row<K>(k, t, u.p1 * width, 0, u.remainder);
}

template <class K, bool Planes, bool Stream, bool Mask> void sum(const Job &job, const Unit &u) {
    if constexpr (Planes)
        sum_planes<K, Mask>(job, u);
    else
        sum_rows<K, Stream>(job, u);
}
template <class K, bool Planes, bool Stream, bool Mask> void store(const Job &job, const Unit &u) {
    if constexpr (Planes)
        store_planes<K, Stream, Mask>(job, u);
    else
        store_rows<K, Stream>(job, u);
#if defined(__SSE2__)
    if (Stream) _mm_sfence();
#endif
}

template <class T> struct Specialized { static constexpr bool value = false; };
#if !defined(GENERIC_ONLY)
template <> struct Specialized<float> { static constexpr bool value = true; };
template <> struct Specialized<BFloat16> { static constexpr bool value = true; };
#endif

// Common cases have specialized loops. All others (with a mask, or in dtypes that are rarely used for training) share
// loops that test the options at run time.
template <class Summed, class K, bool Planes> Loops loops(bool stream) {
    if (stream) return {sum<Summed, Planes, !Planes, false>, store<K, Planes, true, false>};
    return {sum<Summed, Planes, false, false>, store<K, Planes, false, false>};
}
template <template <class, int, int> class KernelOf, class T, bool Planes> Loops general(bool mask) {
    using K = KernelOf<T, 2, RUNTIME>;
    if (mask) return {sum<K, Planes, false, Planes>, store<K, Planes, false, Planes>};
    return {sum<K, Planes, false, false>, store<K, Planes, false, false>};
}
template <class T, bool Planes> Loops forward_loops(const Call &call, bool stream) {
    if constexpr (Specialized<T>::value) {
        using Plain = Forward<T, 0, NONE>;  // its sums use neither residual nor activation
        const bool residual = call.other != nullptr;
        if (!call.mask && call.activation == NONE)
            return residual ? loops<Plain, Forward<T, 1, NONE>, Planes>(stream) : loops<Plain, Plain, Planes>(stream);
        if (!call.mask && call.activation == RELU)
            return residual ? loops<Plain, Forward<T, 1, RELU>, Planes>(stream)
                            : loops<Plain, Forward<T, 0, RELU>, Planes>(stream);
    }
    return general<Forward, T, Planes>(call.mask != nullptr);
}
template <class T, bool Planes> Loops backward_loops(const Call &call, bool stream) {
    if constexpr (Specialized<T>::value) {
        using Plain = Backward<T, 0, NONE>;
        using Relu = Backward<T, 0, RELU>;
        using Added = Backward<T, 1, RELU>;
        if (!call.mask && call.activation == NONE && !call.dresidual) return loops<Plain, Plain, Planes>(stream);
        if (!call.mask && call.activation == RELU && (call.other || !call.dresidual))
            return call.other ? loops<Added, Added, Planes>(stream) : loops<Relu, Relu, Planes>(stream);
    }
    return general<Backward, T, Planes>(call.mask != nullptr);
}
template <class T> Loops loops_for(const Call &call, bool gradients, bool stream) {
    Loops loops;
    if (gradients)
        loops = call.rows ? backward_loops<T, false>(call, stream) : backward_loops<T, true>(call, stream);
    else
        loops = call.rows ? forward_loops<T, false>(call, stream) : forward_loops<T, true>(call, stream);
    loops.prepare_sums = prepare_sums<T>;
    loops.prepare_store = prepare_store<T>;
    loops.pool = pool;
    loops.finish = gradients ? finish_backward<T> : finish_forward<T>;
    return loops;
}

}  // namespace

Loops FIND(const Call &call, bool gradients, bool stream) {
    switch (call.dtype) {
    case FLOAT64: return loops_for<double>(call, gradients, stream);
    case BFLOAT16: return loops_for<BFloat16>(call, gradients, stream);
    case FLOAT16: return loops_for<Half>(call, gradients, stream);
    default: return loops_for<float>(call, gradients, stream);
    }
}

}  // namespace batchnorm
