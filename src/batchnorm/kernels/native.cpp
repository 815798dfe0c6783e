// Batch normalization on CPU behind a plain C interface: pointers and sizes in, a status out. The library depends on
// neither Python nor torch; the caller of bn_use_threads lends it threads. The formulas are those of reference.py.
//
// Statistics are double: mean and biased variance. Values are centered before they are squared: in the first pass on a
// shift taken from the batch, and if that turns out to be far from the mean, in a second pass on the mean. Float loops
// subtract the mean rounded to float; the rounding error is folded into the numbers per channel, as in reference.py. If
// the sums, variance or factors of a channel do not fit a float (values near 1e30, subnormal ones), the channel is
// computed again in double, value by value.

#include "native_channels.h"

#define API extern "C" __attribute__((visibility("default")))

namespace batchnorm {
namespace {

struct InstructionSet {
    const char *name;
    Loops (*find)(const Call &, bool gradients, bool stream);
};
InstructionSet best_instruction_set() {
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
// It is initialized when the library is loaded, before there are threads.
const InstructionSet instruction_set = best_instruction_set();

// Threads lent by the caller: torch_parallel_for and torch_get_num_threads of torch's stable C interface.
typedef void (*Work)(int64_t begin, int64_t end, void *job);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Work work, void *argument);
typedef int32_t (*CountThreads)(uint32_t *threads);
ParallelFor parallel_for = nullptr;
CountThreads count_threads = nullptr;

int64_t threads() {
    uint32_t n = 1;
    return parallel_for && count_threads && count_threads(&n) == 0 && n > 0 ? n : 1;
}
// The function that each thread runs.
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
            if (job.phase & STORE) job.loops.store(job, u);
        }
    }
}
void run(Job &job, int phase) {
    job.phase = phase;
    // If the threads fail, this thread does the work; doing a unit twice gives the same result.
    if (job.parts < 2 || parallel_for(0, job.parts, 1, work, &job) != 0) work(0, job.parts, &job);
}

// The division of work. It is best if one thread sums a channel and then stores it, while the channel is in its cache.
// If channels are too few, or too large, positions are divided between threads and their sums are merged.
constexpr int64_t VALUES_PER_THREAD = 96 << 10;  // below this, waking a thread costs more than it saves
constexpr int64_t RUN_BYTES = 2048;              // contiguous bytes that a unit of planes reads at least
constexpr int64_t ROW_BYTES = 2048;              // several positions make one row of this size, if they are narrower
constexpr int64_t COLUMNS = 256;                 // narrower columns of rows cost more than the cache saves
constexpr int64_t PAGE_BYTES = 4096;             // hardware prefetches within a page; two threads in one page interfere
constexpr int64_t CACHE_BYTES = 512 << 10;       // of a core
constexpr int64_t STREAM_BYTES = 8 << 20;        // outputs from this size would evict everything else from the cache
constexpr int64_t STREAM_RUN_BYTES = 1024;       // shorter runs have too many partially written lines

int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t useful_threads(int64_t values) { return max(1, min(threads(), values / VALUES_PER_THREAD)); }
void divide_work(Job &job, int64_t size, int64_t tensors_read, int64_t workers) {
    const Call &call = *job.call;
    const int64_t positions = call.samples * call.length, channels = call.channels;
    job.positions = positions;
    job.width = channels;
    job.repeats = 1;
    job.splits = 1;
    if (!call.rows) {
        int64_t fill_run = max(1, RUN_BYTES / (call.length * size));
        if (fill_run > 4) fill_run = (fill_run + 7) / 8 * 8;  // whole vectors of channels
        const int64_t share = workers == 1 ? channels : max(1, channels / (4 * workers));
        job.channels_at_once = min(min(fill_run, share), CHANNELS_AT_ONCE);
        if (channels < 4 * workers && channels % workers) job.splits = workers;
    } else {
        const int64_t columns = CACHE_BYTES / (positions * size * tensors_read) / 64 * 64;  // that fit the cache together
        const bool fits_whole = positions * channels * size * tensors_read <= CACHE_BYTES && workers == 1;
        const bool apart = workers == 1 || channels * size > PAGE_BYTES * workers;
        if (columns >= COLUMNS && !fits_whole && apart) {
            job.channels_at_once = min(columns, (channels / workers + 63) / 64 * 64);
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
    job.prefetch_bytes = (call.rows ? STRIP_ROWS * job.width : job.channels_at_once * call.length) * size;
    job.widest = min(job.channels_at_once, job.width);
    job.units = (job.width + job.channels_at_once - 1) / job.channels_at_once * job.splits;
    job.parts = min(workers, job.units);
}
bool aligned(const void *pointer, int64_t to) { return (intptr_t)pointer % to == 0; }
// The size is that of all chunks: y of a chunk that fits the cache would still evict the chunks after it.
bool large(const Call &call, int64_t size) {
    return call.chunks * call.samples * call.channels * call.length * size >= STREAM_BYTES;
}
bool streams(const Job &job, int64_t size) {
    const Call &call = *job.call;
    if (!large(call, size)) return false;
    if (!call.out) return call.rows && !call.dresidual;  // sums alone, which prefetch the next rows
    if (call.dresidual && ((intptr_t)call.dresidual - (intptr_t)call.out) % 64 != 0) return false;
    if (!call.rows) return call.length * size >= STREAM_RUN_BYTES;
    return aligned(call.out, 64) && job.width * size % 64 == 0 && job.channels_at_once * size % 64 == 0;
}

// Compute a batch that has one set of statistics. In backward, sums_of_gradients has room for dweight and dbias of every
// channel.
template <class T>
bool compute_batch(const Call &call, bool gradients, double *sums_of_gradients, int64_t workers, int64_t &count) {
    using A = Arithmetic<T>;
    const int64_t size = sizeof(T), channels = call.channels, positions = call.samples * call.length;
    Job job = {};
    job.call = &call;
    job.dweight = sums_of_gradients;
    job.dbias = gradients ? sums_of_gradients + channels : nullptr;
    job.count = job.count_with_padding = positions;
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
            if (!gradients && call.renorm && !call.renorm_given) renorm_correction(call, c, 1);
        }
        return true;
    }
    divide_work(job, size, gradients ? 2 : 1, workers);

    const int64_t numbers = job.splits * job.width * 2 * sizeof(double), tables = 5 * job.width * sizeof(A);
    const int64_t scratch = job.parts * 2 * job.widest * sizeof(A);
    char *memory = (char *)malloc(numbers + tables + scratch + 2 * channels);
    if (!memory) return false;
    job.first = (double *)memory;
    job.second = job.first + job.splits * job.width;
    job.tables = memory + numbers;
    job.scratch = memory + numbers + tables;
    job.second_pass = (uint8_t *)memory + numbers + tables + scratch;
    job.use_double = job.second_pass + channels;

    const bool stream = streams(job, size);
    job.prefetches = !stream && large(call, size);
    const bool sums = gradients ? call.batch_statistics || call.dweight || call.dbias : call.batch_statistics;
    const int store = call.out || call.dresidual ? STORE : 0;
    job.loops = instruction_set.find(call, gradients, stream);
    job.start = sums && !gradients ? job.loops.prepare_sums : job.loops.prepare_store;
    if (job.splits == 1 && store) {
        run(job, START | (sums ? SUM : 0) | store);
    } else {
        job.start(job, 0, channels);
        if (sums)
            do run(job, SUM);
            while (job.loops.finish(job, 0, channels));
        if (store) run(job, store);
    }

    for (int64_t c = store && any(job.use_double, channels) ? 0 : channels; c < channels; ++c) {
        if (!job.use_double[c]) continue;
        const ScalarLoops<T> scalar{call};
        Channels ch;
        read_channels(call, c, 1, ch);
        const double mean = *ch.mean, inverse = *ch.inverse, gain = *ch.gain, shift = *ch.shift;
        if (!gradients) {
            scalar.forward(c, mean, gain, shift);
        } else {
            double dbias = 0, products = 0;
            if (call.batch_statistics) scalar.sums(c, mean, gain, shift, dbias, products);
            const double m = (double)max(job.count, 1);
            scalar.backward(c, mean, gain, shift, gain * inverse * inverse * products / m, gain * dbias / m);
        }
    }
    free(memory);
    return true;
}

// Return the part of a call that is a virtual batch.
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
    double *sums;     // backward: 2 x channels per chunk; forward: 2 x channels, the pooled moments
    int64_t *counts;  // values per channel, for each chunk
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

INLINE bool fits_dtype(int64_t dtype, double value) { return is_finite(dtype == FLOAT64 ? value : (float)value); }

// Update the running statistics: the batch's have the weight momentum, or, if that is negative, one over the number of
// batches so far. A batch of one value per channel has no unbiased variance, and an empty one no mean, so neither updates
// anything. If skipped is given, a batch in which any channel is not finite updates no channel.
void update(const Call &call, const Chunks &all) {
    double old_mean[BLOCK], old_var[BLOCK];
    double *const means = all.sums, *const vars = means + call.channels;
    int64_t count = 0;
    for (int64_t i = 0; i < call.chunks; ++i) count += all.counts[i];
    const auto pool = instruction_set.find(call, false, false).pool;
    for (int64_t c = 0; c < call.channels; c += BLOCK) {
        const int64_t n = min(call.channels - c, BLOCK);
        pool(call, all.counts, count, c, n, means + c, vars + c);
        bool finite = true;
        for (int64_t i = c; call.skipped && i < c + n; ++i)
            finite &= fits_dtype(call.running_mean_dtype, means[i]) & fits_dtype(call.running_var_dtype, vars[i]);
        if (finite) continue;
        ++*call.skipped;
        return;
    }
    if (call.batches) ++*call.batches;
    if (count < 2) return;
    const double weight = call.momentum < 0 ? 1.0 / (double)max(call.batches ? *call.batches : 1, 1) : call.momentum;
    for (int64_t c = 0; c < call.channels; c += BLOCK) {
        const int64_t n = min(call.channels - c, BLOCK);
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
    const int64_t workers = useful_threads(values), workers_of_chunk = useful_threads(values / chunks);
    // If each thread takes whole chunks, threads wait for each other once, otherwise in every chunk.
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

// Return whether a tensor seems to have no memory: its address is below the smallest one that is expected.
int64_t min_address = 0;
bool lacks_storage(const Call &call) {
    if (call.samples * call.channels * call.length == 0) return false;
    const void *const read[] = {call.x,    call.other,        call.mask,        call.dy,      call.weight, call.bias,
                                call.renorm, call.running_mean, call.running_var, call.batches, call.skipped};
    bool found = false;
    for (const void *values : read) found |= values && (intptr_t)values < min_address;
    return found;
}

}  // namespace
}  // namespace batchnorm

using namespace batchnorm;

// It changes whenever Call or these functions change; library.py refuses a library with another number.
API int32_t bn_abi() { return 4; }
API void bn_set_min_address(int64_t address) { min_address = address; }
API const char *bn_instructions() { return instruction_set.name; }
API void bn_use_threads(ParallelFor run_parallel, CountThreads count) {
    parallel_for = run_parallel;
    count_threads = count;
}
// Write y, the moments and, in training, the running statistics. Return 0, or if nothing was done: 1 where memory for a
// few numbers per channel could not be allocated, 2 where a tensor seems to have no memory.
API int32_t bn_forward(const Call *call) { return lacks_storage(*call) ? 2 : compute(*call, false); }
// Write dx, dweight, dbias and dresidual; return as bn_forward does.
API int32_t bn_backward(const Call *call) { return lacks_storage(*call) ? 2 : compute(*call, true); }
