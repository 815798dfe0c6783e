// Batch normalization on CPU behind a plain C interface: pointers and sizes in, a status out. It knows neither Python
// nor torch, and borrows its threads from whoever calls bn_use_threads. The formulas are those of reference.py.
//
// Statistics are double: mean, biased variance. Values are centred before they are squared: on a shift taken from the
// batch in the first pass, and where that turns out far from the mean, in a second one on the mean. Float loops subtract
// the mean rounded to float; what the rounding left goes into the numbers of the channel, as in reference.py. A channel
// whose sums, variance or factors do not fit a float (values near 1e30, subnormal ones) is computed again, carefully:
// in double, value by value.

#include "native_channels.h"

#define API extern "C" __attribute__((visibility("default")))

namespace batchnorm {
namespace {

struct Set {
    const char *name;
    Loops (*find)(const Call &, bool gradients, bool stream);
};
Set best_set() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#if BUILT(512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return {"AVX-512", find_avx512};
#endif
#if BUILT(256)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"AVX2", find_avx2};
#endif
#endif
#if !BUILT(128)
    abort();
#elif defined(__x86_64__)
    return {"SSE2", find_baseline};
#elif defined(__aarch64__)
    return {"NEON", find_baseline};
#else
    return {"generic vectors", find_baseline};
#endif
}
const Set set = best_set();  // when the library is loaded: no two threads meet here

// Threads, lent by the caller: torch_parallel_for and torch_get_num_threads of torch's stable C interface.
typedef void (*Work)(int64_t begin, int64_t end, void *job);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Work work, void *argument);
typedef int32_t (*CountThreads)(uint32_t *threads);
ParallelFor parallel_for = nullptr;
CountThreads count_threads = nullptr;

int64_t threads() {
    uint32_t n = 1;
    return parallel_for && count_threads && count_threads(&n) == 0 && n > 0 ? n : 1;
}
// What a thread is called with.
void work(int64_t begin, int64_t end, void *argument) {
    const Job &job = *(const Job *)argument;
    for (int64_t part = begin; part < end; ++part) {
        for (int64_t i = part * job.units / job.parts; i < (part + 1) * job.units / job.parts; ++i) {
            const Unit u = unit(job, i, part);
            const bool whole = job.phase & START;  // a unit with all positions of its channels ends what it begins
            if (whole) job.start(job, u.c0, u.c1);
            if (job.phase & SUM)
                do job.loops.sum(job, u);
                while (whole && job.loops.finish(job, u.c0, u.c1));
            if (job.phase & PUT) job.loops.put(job, u);
        }
    }
}
void run(Job &job, int phase) {
    job.phase = phase;
    // Where the threads fail the work is done here: every unit gives the same when it is done twice.
    if (job.parts < 2 || parallel_for(0, job.parts, 1, work, &job) != 0) work(0, job.parts, &job);
}

// How the work is divided. A channel is best summed and then written by one thread, while it is in that thread's cache;
// where channels are too few, or what they hold too much, positions are divided, and sums merged.
constexpr int64_t VALUES_PER_THREAD = 96 << 10;    // below, waking a thread costs more than it brings
constexpr int64_t RUN_BYTES = 2048;                // memory read in one go
constexpr int64_t ROW_BYTES = 2048;                // of one row, where a position's channels take less
constexpr int64_t COLUMNS = 256;                   // narrower columns of rows cost more than the cache brings
constexpr int64_t PAGE_BYTES = 4096;               // what processors read ahead in; two that share it hinder each other
constexpr int64_t CACHE_BYTES = 512 << 10;         // of a core
constexpr int64_t STREAM_BYTES = 8 << 20;          // outputs that would drive everything else out of the cache
constexpr int64_t STREAM_RUN_BYTES = 1024;         // shorter runs have too many lines that are not written whole

int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t worth(int64_t values) { return at_least(1, at_most(threads(), values / VALUES_PER_THREAD)); }
void divide(Job &job, int64_t size, int64_t tensors_read, int64_t workers) {
    const Call &call = *job.call;
    const int64_t positions = call.samples * call.length, channels = call.channels;
    job.positions = positions;
    job.width = channels;
    job.repeats = 1;
    job.splits = 1;
    if (!call.rows) {
        int64_t fill_run = at_least(1, RUN_BYTES / (call.length * size));
        if (fill_run > 4) fill_run = (fill_run + 7) / 8 * 8;  // whole vectors of channels
        const int64_t share = workers == 1 ? channels : at_least(1, channels / (4 * workers));
        job.channels_at_once = at_most(at_most(fill_run, share), CHANNELS_AT_ONCE);
        if (channels < 4 * workers && channels % workers) job.splits = workers;
    } else {
        const int64_t columns = CACHE_BYTES / (positions * size * tensors_read) / 64 * 64;  // in the cache at once
        const bool fits_whole = positions * channels * size * tensors_read <= CACHE_BYTES && workers == 1;
        const bool apart = workers == 1 || channels * size > PAGE_BYTES * workers;
        if (columns >= COLUMNS && !fits_whole && apart) {
            job.channels_at_once = at_most(columns, (channels / workers + 63) / 64 * 64);
        } else {
            if (2 * channels * size <= ROW_BYTES && !call.mask) {
                const int64_t repeats = ROW_BYTES / (channels * size);
                job.repeats = channels % 16 ? (repeats + 15) / 16 * 16 : repeats;
                if (job.repeats * 8 * workers > positions) job.repeats = 1;
            }
            job.positions = positions / job.repeats;
            job.channels_at_once = job.width = channels * job.repeats;
            job.splits = workers;
        }
    }
    job.lead = (call.rows ? STRIP_ROWS * job.width : job.channels_at_once * call.length) * size;
    job.widest = at_most(job.channels_at_once, job.width);
    job.units = (job.width + job.channels_at_once - 1) / job.channels_at_once * job.splits;
    job.parts = at_most(workers, job.units);
}
bool aligned(const void *pointer, int64_t to) { return (intptr_t)pointer % to == 0; }
// Of a chunk that fits the cache y would drive out what comes after it all the same.
bool large(const Call &call, int64_t size) {
    return call.chunks * call.samples * call.channels * call.length * size >= STREAM_BYTES;
}
bool streams(const Job &job, int64_t size) {
    const Call &call = *job.call;
    if (!large(call, size)) return false;
    if (!call.out) return call.rows && !call.dresidual;  // sums alone, which ask for what comes next of rows
    if (call.dresidual && ((intptr_t)call.dresidual - (intptr_t)call.out) % 64 != 0) return false;
    if (!call.rows) return call.length * size >= STREAM_RUN_BYTES;
    return aligned(call.out, 64) && job.width * size % 64 == 0 && job.channels_at_once * size % 64 == 0;
}

// What is one batch to the statistics. Where it is backward, sums has room for dweight and dbias of every channel.
template <class T>
bool compute_batch(const Call &call, bool gradients, double *sums_of_gradients, int64_t workers, int64_t &count) {
    using A = Arithmetic<T>;
    const int64_t size = sizeof(T), channels = call.channels, positions = call.samples * call.length;
    Job job = {};
    job.call = &call;
    job.dweight = sums_of_gradients;
    job.dbias = gradients ? sums_of_gradients + channels : nullptr;
    job.count = job.places = positions;
    if (call.mask) {
        job.count = 0;
        for (int64_t p = 0; p < positions; ++p) job.count += call.mask[p] != 0;
    }
    count = job.count;
    if (channels == 0) return true;
    if (!gradients && !call.batch_statistics) {
        read(call.running_mean, call.running_mean_dtype, 0, channels, 0, call.mean);
        read(call.running_var, call.running_var_dtype, 0, channels, 1, call.var);
    }
    if (positions == 0) {
        for (int64_t c = 0; c < channels; ++c) {
            if (gradients) job.dweight[c] = job.dbias[c] = 0;
            else if (call.batch_statistics) call.mean[c] = call.var[c] = 0;
            if (!gradients && call.renorm && !call.renorm_given) renormalise(call, c, 1);
        }
        return true;
    }
    divide(job, size, gradients ? 2 : 1, workers);

    const int64_t numbers = job.splits * job.width * 2 * sizeof(double), tables = 5 * job.width * sizeof(A);
    const int64_t scratch = job.parts * 2 * job.widest * sizeof(A);
    char *memory = (char *)malloc(numbers + tables + scratch + 2 * channels);
    if (!memory) return false;
    job.first = (double *)memory;
    job.second = job.first + job.splits * job.width;
    job.tables = memory + numbers;
    job.scratch = memory + numbers + tables;
    job.again = (uint8_t *)memory + numbers + tables + scratch;
    job.careful = job.again + channels;

    const bool stream = streams(job, size);
    job.fetches = !stream && large(call, size);
    const bool sums = gradients ? call.batch_statistics || call.dweight || call.dbias : call.batch_statistics;
    const int put = call.out || call.dresidual ? PUT : 0;
    job.loops = set.find(call, gradients, stream);
    job.start = sums && !gradients ? job.loops.shifts : job.loops.moments;
    if (job.splits == 1 && put) {
        run(job, START | (sums ? SUM : 0) | put);
    } else {
        job.start(job, 0, channels);
        if (sums)
            do run(job, SUM);
            while (job.loops.finish(job, 0, channels));
        if (put) run(job, put);
    }

    for (int64_t c = put && any(job.careful, channels) ? 0 : channels; c < channels; ++c) {
        if (!job.careful[c]) continue;
        const Slow<T> slow{call};
        Channels ch;
        of_block(call, c, 1, ch);
        const double mean = *ch.mean, inverse = *ch.inverse, gain = *ch.gain, shift = *ch.shift;
        if (!gradients) {
            slow.forward(c, mean, gain, shift);
        } else {
            double dbias = 0, products = 0;
            if (call.batch_statistics) slow.sums(c, mean, gain, shift, dbias, products);
            const double m = (double)at_least(job.count, 1);
            slow.backward(c, mean, gain, shift, gain * inverse * inverse * products / m, gain * dbias / m);
        }
    }
    free(memory);
    return true;
}

// The part of a call that is a virtual batch.
template <class T> Call chunk_of(const Call &call, int64_t i) {
    Call part = call;
    const int64_t from = i * call.chunk, to = i + 1 < call.chunks ? from + call.chunk : call.samples;
    const int64_t values = from * call.channels * call.length;
    const auto past = [values](const void *at) { return at ? (T *)at + values : nullptr; };
    part.samples = to - from;
    part.x = past(call.x);
    part.other = past(call.other);
    part.dy = past(call.dy);
    part.out = past(call.out);
    part.dresidual = past(call.dresidual);
    if (call.mask) part.mask = call.mask + from * call.length;
    part.mean = call.mean + i * call.channels;
    part.var = call.var + i * call.channels;
    if (call.renorm) part.renorm = call.renorm + i * call.channels;
    return part;
}
struct Chunks {
    const Call *call;
    bool gradients;
    double *sums;     // 2 x channels a chunk; forward 2 x channels, the moments of all chunks together
    int64_t *counts;  // values that a channel has in each chunk
    bool *done;
};
template <class T> void compute_chunk(const Chunks &all, int64_t i, int64_t workers) {
    const Call part = chunk_of<T>(*all.call, i);
    double *const sums = all.gradients ? all.sums + 2 * i * part.channels : nullptr;
    all.done[i] = compute_batch<T>(part, all.gradients, sums, workers, all.counts[i]);
}
template <class T> void compute_chunks(int64_t begin, int64_t end, void *argument) {
    const Chunks &all = *(const Chunks *)argument;
    for (int64_t i = begin; i < end; ++i)
        compute_chunk<T>(all, i, 1);
}

INLINE bool holds(int64_t dtype, double value) { return bounded(dtype == FLOAT64 ? value : (float)value); }

// Running statistics take a part of the batch's: momentum of it, or where that is below 0 one over the batches so far.
// A batch of one value has no unbiased variance, and one of none no mean: neither moves anything. Where skipped is
// given, a batch with a channel that is not finite moves nothing in any.
void update(const Call &call, const Chunks &all) {
    double old_mean[BLOCK], old_var[BLOCK];
    double *const means = all.sums, *const vars = means + call.channels;
    int64_t count = 0;
    for (int64_t i = 0; i < call.chunks; ++i) count += all.counts[i];
    const auto pool = set.find(call, false, false).pool;
    for (int64_t c = 0; c < call.channels; c += BLOCK) {
        const int64_t n = at_most(call.channels - c, BLOCK);
        pool(call, all.counts, count, c, n, means + c, vars + c);
        bool finite = true;
        for (int64_t i = c; call.skipped && i < c + n; ++i)
            finite &= holds(call.running_mean_dtype, means[i]) & holds(call.running_var_dtype, vars[i]);
        if (finite) continue;
        ++*call.skipped;
        return;
    }
    if (call.batches) ++*call.batches;
    if (count < 2) return;
    const double weight = call.momentum < 0 ? 1.0 / (double)at_least(call.batches ? *call.batches : 1, 1) : call.momentum;
    for (int64_t c = 0; c < call.channels; c += BLOCK) {
        const int64_t n = at_most(call.channels - c, BLOCK);
        double *const mean = means + c, *const var = vars + c;
        read(call.running_mean, call.running_mean_dtype, c, n, 0, old_mean);
        read(call.running_var, call.running_var_dtype, c, n, 0, old_var);
        CHANNELWISE {
            mean[i] = weight * mean[i] + (1 - weight) * old_mean[i];
            var[i] = weight * var[i] + (1 - weight) * old_var[i];
        }
        write(call.running_mean, call.running_mean_dtype, c, n, mean);
        write(call.running_var, call.running_var_dtype, c, n, var);
    }
}

template <class T> int32_t compute(const Call &call, bool gradients) {
    const int64_t chunks = call.chunks, numbers = 2 * (gradients ? chunks : 1) * call.channels;
    const int64_t values = call.samples * call.channels * call.length;
    char *memory = (char *)malloc(numbers * sizeof(double) + chunks * (sizeof(int64_t) + sizeof(bool)));
    if (!memory) return 1;
    int64_t *counts = (int64_t *)memory + numbers;
    Chunks all = {&call, gradients, (double *)memory, counts, (bool *)(counts + chunks)};
    const int64_t workers = worth(values), workers_of_chunk = worth(values / chunks);
    // Threads wait for each other once where each takes chunks of its own, else in every chunk.
    const bool even = chunks >= 4 * workers || chunks % workers == 0;
    if (workers == 1 || chunks == 1 || (workers_of_chunk == workers && !even)) {
        for (int64_t i = 0; i < chunks; ++i) compute_chunk<T>(all, i, workers);
    } else if (parallel_for(0, chunks, (chunks + workers - 1) / workers, compute_chunks<T>, &all) != 0) {
        compute_chunks<T>(0, chunks, &all);  // the threads failed
    }
    bool done = true;
    for (int64_t i = 0; i < chunks; ++i) done = done && all.done[i];
    if (done && gradients) {
        double *const dweight = all.sums, *const dbias = all.sums + call.channels;
        for (int64_t i = 1, n = 2 * call.channels; i < chunks; ++i) {
            const double *const sums = all.sums + i * n;
#pragma omp simd
            for (int64_t c = 0; c < n; ++c) all.sums[c] += sums[c];
        }
        write(call.dweight, call.weight_dtype, 0, call.channels, dweight);
        write(call.dbias, call.bias_dtype, 0, call.channels, dbias);
    } else if (done && call.update_running) {
        update(call, all);
    }
    free(memory);
    return done ? 0 : 1;
}
int32_t compute(const Call &call, bool gradients) {
    switch (call.dtype) {
    case FLOAT64: return compute<double>(call, gradients);
    case BFLOAT16: return compute<BFloat16>(call, gradients);
    case FLOAT16: return compute<Half>(call, gradients);
    default: return compute<float>(call, gradients);
    }
}

// Whether a tensor's values seem to be where no memory is: below the first address that is believed.
int64_t first_address = 0;
bool is_nowhere(const Call &call) {
    if (call.samples * call.channels * call.length == 0) return false;
    const void *const read[] = {call.x,    call.other,        call.mask,        call.dy,      call.weight, call.bias,
                                call.renorm, call.running_mean, call.running_var, call.batches, call.skipped};
    bool found = false;
    for (const void *values : read) found |= values && (intptr_t)values < first_address;
    return found;
}

}  // namespace
}  // namespace batchnorm

using namespace batchnorm;

// Changes whenever Call or the functions do: native.py refuses a library of another number.
API int32_t bn_abi() { return 4; }
API void bn_set_min_address(int64_t address) { first_address = address; }
API const char *bn_instructions() { return set.name; }
API void bn_use_threads(ParallelFor run_parallel, CountThreads count) {
    parallel_for = run_parallel;
    count_threads = count;
}
// y, and in training the moments and the running statistics. 0, or where nothing was done 1, since memory for a few
// numbers a channel is lacking, or 2, since a tensor is nowhere.
API int32_t bn_forward(const Call *call) { return is_nowhere(*call) ? 2 : compute(*call, false); }
// dx, dweight, dbias and dresidual.
API int32_t bn_backward(const Call *call) { return is_nowhere(*call) ? 2 : compute(*call, true); }
