// The loops over values, for the instruction set of the file that includes this: it gives W, the width of a vector in
// bytes, and FIND, the name under which native.cpp knows them.
//
// A kernel K is Forward or Backward of one dtype. K::terms gives the two numbers a value adds to its channel's sums,
// K::put writes what comes out. Two ways of walking lead over the values: planes, where a channel of a sample is one run
// of memory (contiguous tensors), and rows, where a position's channels are (channels last, and (N, C)).

#include "native_channels.h"

namespace batchnorm {
namespace {

template <class A> struct Of;
template <> struct Of<float> {
    typedef float vector __attribute__((vector_size(W)));
    typedef int32_t bits __attribute__((vector_size(W)));
    typedef uint8_t bytes __attribute__((vector_size(W / 4)));
};
template <> struct Of<double> {
    typedef double vector __attribute__((vector_size(W)));
    typedef int64_t bits __attribute__((vector_size(W)));
    typedef uint8_t bytes __attribute__((vector_size(W / 8)));
};
template <class A> using Vector = typename Of<A>::vector;
template <class A> using Bits = typename Of<A>::bits;
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
INLINE Vector<float> numbers(const float *from) { return table_at(from); }
INLINE Vector<double> numbers(const double *from) { return table_at(from); }

// Two vectors that are computed with alike. bfloat16 values are taken so where they can be: of each 32 bits the lower half
// is a value of the first vector, the upper one of the second, and no lane needs to be moved.
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

// Half precision: 16 bits in memory, 32 in the arithmetic. The conversions are those of native.h, lane by lane.
typedef uint32_t Words __attribute__((vector_size(W)));
typedef uint16_t Halves __attribute__((vector_size(W / 2)));
template <class H> INLINE Vector<float> widen(const H *from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
#if defined(WIDEN)
    const Words words = cast<Words>(WIDEN(halves));  // one instruction, where GCC makes four of the conversion
#else
    const Words words = __builtin_convertvector(halves, Words);
#endif
    return cast<Vector<float>>(H::template to_float_bits<Words, Vector<float>>(words));
}
INLINE Vector<float> numbers(const BFloat16 *from) {
#if defined(WIDEN_UP)
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return cast<Vector<float>>(WIDEN_UP(halves));
#else
    return widen(from);
#endif
}
INLINE Vector<float> numbers(const Half *from) { return widen(from); }

// Stream tells the processor not to keep the line in its cache: right where the whole output would not fit anyway.
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
template <bool Stream> INLINE void store(float *to, Vector<float> values) { write<Stream>(to, values); }
template <bool Stream> INLINE void store(double *to, Vector<double> values) { write<Stream>(to, values); }
template <bool Stream, class H> INLINE void store(H *to, Vector<float> values) {
    Words words = H::template from_float_bits<Words, Vector<float>>(cast<Words>(values));
    write<Stream>(to, __builtin_convertvector(words, Halves));
}
#if defined(NARROW_UP)
template <bool Stream> INLINE void store(BFloat16 *to, Vector<float> values) {
    write<Stream>(to, NARROW_UP(BFloat16::rounded<Words>(cast<Words>(values))));
}
#endif

// How many values: a vector; the first n, where fewer are there, the other lanes reading as 0; or two vectors.
enum Group : int { ONE, PART, PAIR };
template <int G, class T> INLINE auto load(const T *from, int64_t n) {
    if constexpr (G == PAIR) {
        Words words;
        memcpy(&words, from, sizeof words);
        return Two{cast<Vector<float>>(words << 16), cast<Vector<float>>(words & 0xffff0000u)};
    } else if constexpr (G == ONE) {
        return numbers(from);
    } else {
        T whole[lanes<Arithmetic<T>>] = {};
        for (int64_t i = 0; i < n; ++i) whole[i] = from[i];
        return numbers(whole);
    }
}
template <int G, bool Stream, class T, class V> INLINE void save(T *to, V values, int64_t n) {
    if constexpr (G == PAIR) {
        const Words low = BFloat16::rounded<Words>(cast<Words>(values.a)) >> 16;
        write<Stream>(to, low | (BFloat16::rounded<Words>(cast<Words>(values.b)) & 0xffff0000u));
    } else if constexpr (G == ONE) {
        store<Stream>(to, values);
    } else {
        T whole[lanes<Arithmetic<T>>];
        store<false>(whole, values);
        for (int64_t i = 0; i < n; ++i) to[i] = whole[i];
    }
}
template <class A> INLINE Bits<A> lanes_from(int64_t first, int64_t end) {
    Bits<A> lane;
    for (int64_t i = 0; i < lanes<A>; ++i) lane[i] = i;
    const Bits<A> from = Bits<A>{} + (Integer<A>)first, to = Bits<A>{} + (Integer<A>)end;
    return (lane >= from) & (lane < to);
}
template <bool Part, class A> INLINE Bits<A> counted(const uint8_t *mask, int64_t n) {
    typename Of<A>::bytes bytes = {};
    if (Part)
        for (int64_t i = 0; i < n; ++i) bytes[i] = mask[i];
    else
        memcpy(&bytes, mask, sizeof bytes);
    return __builtin_convertvector(bytes, Bits<A>) != Bits<A>{};
}

// No step is taken from a mask that isn't there.
template <bool Mask> INLINE const uint8_t *past(const uint8_t *mask, int64_t n) { return Mask ? mask + n : nullptr; }

template <class A> struct Parameters {
    Vector<A> mean, gain, shift, slope, level;
};
template <class A> INLINE Parameters<A> of_channel(const Tables<A> &t, int64_t c) {
    return {splat(t.mean[c]), splat(t.gain[c]), splat(t.shift[c]), splat(t.slope[c]), splat(t.level[c])};
}
template <bool Part, class A> INLINE Parameters<A> of_channels(const Tables<A> &t, int64_t c, int64_t n) {
    return {load<Part>(t.mean + c, n), load<Part>(t.gain + c, n), load<Part>(t.shift + c, n),
            load<Part>(t.slope + c, n), load<Part>(t.level + c, n)};
}

// A kernel holds its pointers by value: the compiler then knows that no store changes them.
// Residual: 0 none, 1 there, 2 said by the job. Act: an Activation, or SAID_BY_JOB.
template <class T> struct Paired { static constexpr bool value = false; };
template <> struct Paired<BFloat16> { static constexpr bool value = true; };
template <class T, int Residual, int Act> struct Kernel {
    static constexpr bool common = Act != SAID_BY_JOB, paired = common && Paired<T>::value;
    using Value = T;
    using A = Arithmetic<T>;
    using V = Vector<A>;
    const T *x, *other, *dy;
    T *out, *dresidual;
    int64_t activation, width, lead;
    Bits<A> batch_statistics;  // all ones, or all zeros

    INLINE void read(const Job &job) {
        const Call &call = *job.call;
        x = (const T *)call.x;
        other = (const T *)call.other;
        dy = (const T *)call.dy;
        out = (T *)call.out;
        dresidual = (T *)call.dresidual;
        activation = call.activation;
        width = job.width;
        lead = job.lead;
        batch_statistics = Bits<A>{} - (Integer<A>)(call.batch_statistics != 0);
    }
    // Memory gives most while it is read and written at once: with each line of values that are written, one of those to
    // come is asked for, of planes the next unit's, of rows a few rows on; into the second cache, as the first is too small.
    INLINE void ahead(int64_t at) const {
        __builtin_prefetch((const char *)(x + at) + lead, 0, 2);
        if (dy) __builtin_prefetch((const char *)(dy + at) + lead, 0, 2);
        if (Residual != 0) __builtin_prefetch((const char *)(other + at) + lead, 0, 2);
    }
    // A whole stretch, where no line was asked for so.
    INLINE void fetch(int64_t at, int64_t n) const {
        for (int64_t i = at; i < at + n; i += 64 / (int64_t)sizeof(T)) {
            __builtin_prefetch(x + i, 0, 2);
            if (dy) __builtin_prefetch(dy + i, 0, 2);
            if (Residual != 0 && other) __builtin_prefetch(other + i, 0, 2);
        }
    }
    INLINE bool is(int64_t which) const { return Act == SAID_BY_JOB ? activation == which : Act == which; }
    INLINE bool has_other() const {
        if constexpr (Residual == 2)
            return other != nullptr;
        else
            return Residual == 1;
    }
};

template <class A, bool Mask, class L> INLINE L counting(L values, Bits<A> where) {
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
    INLINE void put(const Parameters<A> &p, int64_t at, int64_t n, Bits<A> where) const {
        auto z = (load<G>(this->x + at, n) - p.mean) * p.gain + p.shift;
        if (this->has_other()) z = z + load<G>(this->other + at, n);
        // NaN is not below 0, and so stays.
        if (this->is(RELU)) z = drop<A>(z, below_zero(z));
        if (this->is(LEAKY_RELU)) z = choose<A>(below_zero(z), z * splat((A)LEAKY_SLOPE), z);
        save<G, Stream>(this->out + at, counting<A, Mask>(z, where), n);
    }
};

template <class T, int Residual, int Act> struct Backward : Kernel<T, Residual, Act> {
    using Base = Kernel<T, Residual, Act>;
    using typename Base::A;

    // The gradient of the activation's argument, and x - mean.
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
    INLINE void put(const Parameters<A> &p, int64_t at, int64_t n, Bits<A> where) const {
        decltype(load<G>(this->x, n)) d;
        const auto dz = argument<G>(p, at, n, d);
        // No branch, and one way to fuse product and sum: else a value's rounding would depend on where it stands.
        const auto dx = dz * p.gain - keep<A>(d * p.slope + p.level, this->batch_statistics);
        if (this->out) save<G, Stream>(this->out + at, counting<A, Mask>(dx, where), n);
        if (Residual != 0 && this->dresidual) save<G, Stream>(this->dresidual + at, counting<A, Mask>(dz, where), n);
    }
};

// Sums of a channel. Float lanes are emptied into doubles before they have taken many values, so that the error does
// not grow with the batch.
template <class A> struct Sums {
    Vector<A> a, b;
    double first, second;
    int64_t held;
};
constexpr int64_t HELD = 4096;
template <class A> INLINE void empty(Sums<A> &sums) {
    for (int64_t i = 0; i < lanes<A>; ++i) {
        sums.first += (double)sums.a[i];
        sums.second += (double)sums.b[i];
    }
    sums.a = sums.b = Vector<A>{};
    sums.held = 0;
}

template <class K, bool Mask, bool Part>
INLINE void sum_step(const K &k, const Parameters<typename K::A> &p, int64_t at, const uint8_t *mask, int64_t n,
                     bool all, Bits<typename K::A> which, Vector<typename K::A> &a, Vector<typename K::A> &b) {
    using A = typename K::A;
    Vector<A> first, second;
    k.template terms<Part>(p, at, n, first, second);
    if (Mask) which = all ? counted<Part, A>(mask, n) : which & counted<Part, A>(mask, n);
    if (Mask || !all) {
        first = keep<A>(first, which);
        second = keep<A>(second, which);
    }
    a += first;
    b += second;
}
// Runs shorter than a vector: rare, and so not inlined everywhere.
template <class K, bool Mask>
__attribute__((noinline)) void sum_short(const K k, const Parameters<typename K::A> &p, int64_t at,
                                         const uint8_t *mask, int64_t n, Sums<typename K::A> &sums) {
    using A = typename K::A;
    sum_step<K, Mask, true>(k, p, at, mask, n, false, lanes_from<A>(0, n), sums.a, sums.b);
}
template <class K, bool Mask>
__attribute__((noinline)) void put_short(const K k, const Parameters<typename K::A> &p, int64_t at,
                                         const uint8_t *mask, int64_t n) {
    using A = typename K::A;
    k.template put<true, false, Mask>(p, at, n, Mask ? counted<true, A>(mask, n) : Bits<A>{});
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
        for (; K::common && i + 4 * step <= n; i += 4 * step) {
            sum_step<K, Mask, false>(k, p, at + i, past<Mask>(mask, i), step, true, any, sums.a, sums.b);
            sum_step<K, Mask, false>(k, p, at + i + step, past<Mask>(mask, i + step), step, true, any, a1, b1);
            sum_step<K, Mask, false>(k, p, at + i + 2 * step, past<Mask>(mask, i + 2 * step), step, true, any, a2, b2);
            sum_step<K, Mask, false>(k, p, at + i + 3 * step, past<Mask>(mask, i + 3 * step), step, true, any, a3, b3);
        }
        for (; i + step <= n; i += step)
            sum_step<K, Mask, false>(k, p, at + i, past<Mask>(mask, i), step, true, any, a1, b1);
        if (i < n)  // the last whole vector again, of which only the lanes not yet taken count
            sum_step<K, Mask, false>(k, p, at + n - step, past<Mask>(mask, n - step), step, false, last, a2, b2);
        sums.a += (a1 + a2) + a3;
        sums.b += (b1 + b2) + b3;
    }
    sums.held += n;
    if (sums.held >= HELD) empty(sums);
}
template <class K, bool Stream, bool Mask>
INLINE void put_run(const K &k, const Parameters<typename K::A> &p, int64_t at, const uint8_t *mask, int64_t n) {
    using A = typename K::A;
    using T = typename K::Value;
    constexpr int64_t step = lanes<A>;
    const Bits<A> any = {};
    if (n < step) return put_short<K, Mask>(k, p, at, mask, n);
    int64_t i = 0;
    if (Stream) {  // whole cache lines, which begin at multiples of 64 bytes
        k.ahead(at);
        k.ahead(at + n - 1);
        const int64_t head = (-(intptr_t)(k.out + at) & 63) / (int64_t)sizeof(T);
        for (; i < head && i < n; i += step)
            put_short<K, Mask>(k, p, at + i, mask, (head < n ? head : n) - i < step ? (head < n ? head : n) - i : step);
        if (head < i) i = head;
    }
    if constexpr (K::paired)
        for (; i + 2 * step <= n; i += 2 * step) {
            if (Stream) k.ahead(at + i);
            k.template put<PAIR, Stream, false>(p, at + i, step, any);
        }
    for (; i + step <= n; i += step) {
        if (Stream) k.ahead(at + i);
        k.template put<false, Stream, Mask>(p, at + i, step, Mask ? counted<false, A>(mask + i, step) : any);
    }
    if (i < n)
        k.template put<false, false, Mask>(p, at + n - step, step,
                                            Mask ? counted<false, A>(mask + n - step, step) : any);
}

// Planes: channels [c0, c1) at positions [p0, p1), a position being sample * length + place.
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
        if (job.fetches) k.fetch(((n + 1) * channels + u.c0) * length + from, (u.c1 - u.c0) * length);
        for (int64_t c = u.c0; c < u.c1; ++c)
            for (int64_t i = from; i < to; i += HELD)
                sum_run<K, Mask>(k, of_channel(t, c), (n * channels + c) * length + i,
                                 Mask ? job.call->mask + n * length + i : nullptr, to - i < HELD ? to - i : HELD, last,
                                 sums[c - u.c0]);
    }
    for (int64_t c = u.c0; c < u.c1; ++c) {
        empty(sums[c - u.c0]);
        job.first[u.split * job.width + c] = sums[c - u.c0].first;
        job.second[u.split * job.width + c] = sums[c - u.c0].second;
    }
}
template <class K, bool Stream, bool Mask>
INLINE void put_planes(const Job &job, const Unit &u) {
    K k;
    k.read(job);
    using A = typename K::A;
    const Tables<A> &t = tables<A>(job);
    const int64_t length = job.call->length, channels = job.call->channels;
    for (int64_t n = u.p0 / length; n * length < u.p1; ++n) {
        const int64_t from = u.p0 > n * length ? u.p0 - n * length : 0;
        const int64_t to = u.p1 < (n + 1) * length ? u.p1 - n * length : length;
        for (int64_t c = u.c0; c < u.c1; ++c)
            put_run<K, Stream, Mask>(k, of_channel(t, c), (n * channels + c) * length + from,
                                     Mask ? job.call->mask + n * length + from : nullptr, to - from);
    }
}

// Rows: columns [c0, c1) of rows [p0, p1), each job.width values wide. Where channels are few, several positions make
// one row, and the tables hold their channels as many times. They are walked in strips, a few vectors of columns down a
// block of rows, so that the numbers of the channels and the sums stay in registers.
// Vectors: 4, where there are 32 of them (AVX-512) or fewer would be half a line of memory (AVX2, values of 16 bits), which
// should go past the cache whole; else 2 of the 16.
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
        p[s] = of_channels<false>(t, c + s * step, step);
        first[s] = second[s] = Vector<A>{};
    }
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t from = at + row * k.width + c;
        EACH_VECTOR {
            Vector<A> one, other;
            if (Stream && s * step * sizeof(typename K::Value) % 64 == 0) k.ahead(from + s * step);
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
        store<false>(a + s * step, table_at(a + s * step) + first[s]);
        store<false>(b + s * step, table_at(b + s * step) + second[s]);
    }
}
template <class K>
INLINE void sum_narrow(const K &k, const Tables<typename K::A> &t, int64_t at, int64_t rows, int64_t c, int64_t n,
                       typename K::A *a, typename K::A *b) {
    using A = typename K::A;
    const Parameters<A> p = of_channels<true>(t, c, n);
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
    if (c < c1)  // the last whole vector again, of which only the columns not yet taken count
        sum_strip<K, 1, false>(k, t, at, rows, c1 - step, lanes_from<A>(step - (c1 - c), step), false, a + c1 - step - c0,
                               b + c1 - step - c0);
}
template <class K>
__attribute__((noinline)) void sum_row(const K k, const Tables<typename K::A> &t, int64_t at, int64_t c0, int64_t c1,
                                       typename K::A *a, typename K::A *b) {
    sum_some_rows<K, false>(k, t, at, 1, c0, c1, a, b);
}
template <class A> INLINE void empty(A *a, A *b, int64_t n, double *first, double *second) {
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
    for (int64_t begin = u.p0; begin < u.p1; begin += ROWS_HELD) {
        const int64_t end = u.p1 - begin < ROWS_HELD ? u.p1 : begin + ROWS_HELD;
        int64_t row = begin;
        if (job.call->mask) {
            for (; row < end; ++row)
                if (job.call->mask[row]) sum_row<K>(k, t, row * width, u.c0, u.c1, a, b);
        } else {
            for (; row < end; row += STRIP_ROWS)
                sum_some_rows<K, Stream>(k, t, row * width, end - row < STRIP_ROWS ? end - row : STRIP_ROWS, u.c0, u.c1, a,
                                         b);
        }
        empty(a, b, columns, first, second);
    }
    if (u.rest) {  // the positions that make no whole row
        sum_row<K>(k, t, u.p1 * width, 0, u.rest, a, b);
        empty(a, b, u.rest, first, second);
    }
}
template <class K, int S, bool Stream>
INLINE void put_strip(const K &k, const Tables<typename K::A> &t, int64_t at, int64_t rows, int64_t c) {
    using A = typename K::A;
    constexpr int64_t step = lanes<A>;
    const Bits<A> any = {};
    Parameters<A> p[S];
    EACH_VECTOR p[s] = of_channels<false>(t, c + s * step, step);
    for (int64_t row = 0; row < rows; ++row)
        EACH_VECTOR {
            const int64_t here = at + row * k.width + c + s * step;
            if (Stream && s * step * sizeof(typename K::Value) % 64 == 0) k.ahead(here);
            k.template put<ONE, Stream, false>(p[s], here, step, any);
        }
}
template <class K, bool Stream>
INLINE void put_some_rows(const K &k, const Tables<typename K::A> &t, int64_t at, int64_t rows, int64_t c0, int64_t c1) {
    using A = typename K::A;
    constexpr int64_t step = lanes<A>;
    const Bits<A> any = {};
    if (c1 - c0 < step) {
        const Parameters<A> p = of_channels<true>(t, c0, c1 - c0);
        for (int64_t row = 0; row < rows; ++row)
            k.template put<PART, false, false>(p, at + row * k.width + c0, c1 - c0, any);
        return;
    }
    int64_t c = c0;
    constexpr int strip = STRIP<typename K::Value>;
    for (; c + strip * step <= c1; c += strip * step) put_strip<K, strip, Stream>(k, t, at, rows, c);
    for (; c + step <= c1; c += step) put_strip<K, 1, Stream>(k, t, at, rows, c);
    if (c < c1) put_strip<K, 1, false>(k, t, at, rows, c1 - step);
}
template <class K>
__attribute__((noinline)) void put_row(const K k, const Tables<typename K::A> &t, int64_t at, int64_t c0, int64_t c1) {
    put_some_rows<K, false>(k, t, at, 1, c0, c1);
}
template <class K, bool Stream>
INLINE void put_rows(const Job &job, const Unit &u) {
    K k;
    k.read(job);
    using T = typename K::Value;
    const Tables<typename K::A> &t = tables<typename K::A>(job);
    const int64_t width = job.width;
    int64_t row = u.p0;
    if (job.call->mask) {
        for (; row < u.p1; ++row) {
            if (job.call->mask[row]) {
                put_row<K>(k, t, row * width, u.c0, u.c1);
                continue;
            }
            if (job.call->out) memset((T *)job.call->out + row * width + u.c0, 0, (u.c1 - u.c0) * sizeof(T));
            if (job.call->dresidual) memset((T *)job.call->dresidual + row * width + u.c0, 0, (u.c1 - u.c0) * sizeof(T));
        }
        return;
    }
    // From the end: what the sums read last is still in the cache.
    for (int64_t end = u.p1; end > u.p0;) {
        const int64_t begin = end - u.p0 < ROWS_HELD ? u.p0 : end - ROWS_HELD;
        for (row = begin; row < end; row += STRIP_ROWS)
            put_some_rows<K, Stream>(k, t, row * width, end - row < STRIP_ROWS ? end - row : STRIP_ROWS, u.c0, u.c1);
        end = begin;
    }
    if (u.rest) put_row<K>(k, t, u.p1 * width, 0, u.rest);
}

template <class K, bool Planes, bool Stream, bool Mask> void sum(const Job &job, const Unit &u) {
    if constexpr (Planes)
        sum_planes<K, Mask>(job, u);
    else
        sum_rows<K, Stream>(job, u);
}
template <class K, bool Planes, bool Stream, bool Mask> void put(const Job &job, const Unit &u) {
    if constexpr (Planes)
        put_planes<K, Stream, Mask>(job, u);
    else
        put_rows<K, Stream>(job, u);
#if defined(__SSE2__)
    if (Stream) _mm_sfence();
#endif
}

template <class T> struct Common { static constexpr bool value = false; };
#if !defined(RARE)
template <> struct Common<float> { static constexpr bool value = true; };
template <> struct Common<BFloat16> { static constexpr bool value = true; };
#endif

// The common cases get loops of their own; in all others (with a mask, in the dtypes that are rarely trained in) the
// loops look at the job again and again.
template <class Summed, class K, bool Planes> Loops loops(bool stream) {
    if (stream) return {sum<Summed, Planes, !Planes, false>, put<K, Planes, true, false>};
    return {sum<Summed, Planes, false, false>, put<K, Planes, false, false>};
}
template <template <class, int, int> class Of, class T, bool Planes> Loops general(bool mask) {
    using K = Of<T, 2, SAID_BY_JOB>;
    if (mask) return {sum<K, Planes, false, Planes>, put<K, Planes, false, Planes>};
    return {sum<K, Planes, false, false>, put<K, Planes, false, false>};
}
template <class T, bool Planes> Loops forward_of(const Call &call, bool stream) {
    if constexpr (Common<T>::value) {
        using Plain = Forward<T, 0, NONE>;  // sums know neither residual nor activation
        const bool residual = call.other != nullptr;
        if (!call.mask && call.activation == NONE)
            return residual ? loops<Plain, Forward<T, 1, NONE>, Planes>(stream) : loops<Plain, Plain, Planes>(stream);
        if (!call.mask && call.activation == RELU)
            return residual ? loops<Plain, Forward<T, 1, RELU>, Planes>(stream)
                            : loops<Plain, Forward<T, 0, RELU>, Planes>(stream);
    }
    return general<Forward, T, Planes>(call.mask != nullptr);
}
template <class T, bool Planes> Loops backward_of(const Call &call, bool stream) {
    if constexpr (Common<T>::value) {
        using Plain = Backward<T, 0, NONE>;
        using Relu = Backward<T, 0, RELU>;
        using Added = Backward<T, 1, RELU>;
        if (!call.mask && call.activation == NONE && !call.dresidual) return loops<Plain, Plain, Planes>(stream);
        if (!call.mask && call.activation == RELU && (call.other || !call.dresidual))
            return call.other ? loops<Added, Added, Planes>(stream) : loops<Relu, Relu, Planes>(stream);
    }
    return general<Backward, T, Planes>(call.mask != nullptr);
}
template <class T> Loops of_dtype(const Call &call, bool gradients, bool stream) {
    Loops loops;
    if (gradients)
        loops = call.rows ? backward_of<T, false>(call, stream) : backward_of<T, true>(call, stream);
    else
        loops = call.rows ? forward_of<T, false>(call, stream) : forward_of<T, true>(call, stream);
    loops.shifts = with_shifts<T>;
    loops.moments = with_moments<T>;
    loops.pool = pool;
    loops.finish = gradients ? finish_backward<T> : finish_forward<T>;
    return loops;
}

}  // namespace

Loops FIND(const Call &call, bool gradients, bool stream) {
    switch (call.dtype) {
    case FLOAT64: return of_dtype<double>(call, gradients, stream);
    case BFLOAT16: return of_dtype<BFloat16>(call, gradients, stream);
    case FLOAT16: return of_dtype<Half>(call, gradients, stream);
    default: return of_dtype<float>(call, gradients, stream);
    }
}

}  // namespace batchnorm
