// Compare the kernels with simple loops in double where there is no Python, as in the emulator of another architecture.
#include <stdio.h>

#include "native.h"

using namespace batchnorm;

extern "C" {
const char *bn_instructions();
void bn_use_threads(int32_t (*run)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *),
                    int32_t (*count)(uint32_t *));
int32_t bn_forward(const Call *);
int32_t bn_backward(const Call *);
}

static int32_t in_turn(int64_t begin, int64_t end, int64_t, void (*work)(int64_t, int64_t, void *), void *argument) {
    for (int64_t i = end - 1; i >= begin; --i) work(i, i + 1, argument);
    return 0;
}
static uint32_t threads;
static int32_t count_threads(uint32_t *n) {
    *n = threads;
    return 0;
}

static uint64_t state = 1;
static double uniform() {  // -2 to 2
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 11) * 0x1p-51 - 2;
}
template <class T> static T *array(int64_t n) { return (T *)malloc((size_t)n * sizeof(T)); }

static int cases, wrong;
static void hold(const char *what, double got, double want, double tolerance) {
    if (fabs(got - want) <= tolerance) return;
    if (++wrong < 10) printf("  %s: %.9g, not %.9g\n", what, got, want);
}

struct Shape {
    int64_t rows, samples, channels, length;
};
template <class T> static void check(Dtype dtype, double unit, Shape s, int activation, bool residual, bool masked) {
    const int64_t n = s.samples * s.channels * s.length, positions = s.samples * s.length, C = s.channels;
    T *x = array<T>(n), *other = array<T>(n), *dy = array<T>(n), *y = array<T>(n), *dx = array<T>(n), *dr = array<T>(n);
    uint8_t *mask = array<uint8_t>(positions);
    double *weight = array<double>(C), *bias = array<double>(C), *mean = array<double>(C), *var = array<double>(C);
    double *dweight = array<double>(C), *dbias = array<double>(C);
    for (int64_t i = 0; i < n; ++i) {
        assign(x[i], uniform() + 3);
        assign(other[i], uniform());
        assign(dy[i], uniform());
    }
    for (int64_t p = 0; p < positions; ++p) mask[p] = uniform() > -1;
    mask[0] = mask[positions - 1] = 1;
    for (int64_t c = 0; c < C; ++c) {
        weight[c] = uniform() + 3;
        bias[c] = uniform();
    }
    auto offset = [&](int64_t p, int64_t c) {
        return s.rows ? p * C + c : (p / s.length * C + c) * s.length + p % s.length;
    };
    auto counts = [&](int64_t p) { return !masked || mask[p]; };
    Call call = {};
    call.dtype = dtype;
    call.rows = s.rows;
    call.samples = s.samples;
    call.channels = C;
    call.length = s.length;
    call.chunks = 1;
    call.x = x;
    call.other = residual ? other : nullptr;
    call.mask = masked ? mask : nullptr;
    call.out = y;
    call.weight = weight;
    call.bias = bias;
    call.weight_dtype = call.bias_dtype = FLOAT64;
    call.mean = mean;
    call.var = var;
    call.batch_statistics = 1;
    call.activation = activation;
    call.eps = 1e-5;
    const int before = wrong;
    if (bn_forward(&call)) hold("memory", 1, 0, 0);

    double m = 0;
    for (int64_t p = 0; p < positions; ++p) m += counts(p);
    const double slope = activation == LEAKY_RELU ? LEAKY_SLOPE : 0;
    double *means = array<double>(C), *inverses = array<double>(C);
    for (int64_t c = 0; c < C; ++c) {
        double sum = 0, squares = 0;
        for (int64_t p = 0; p < positions; ++p) sum += counts(p) ? to_double(x[offset(p, c)]) : 0;
        const double mu = sum / m;
        for (int64_t p = 0; p < positions; ++p) {
            const double d = to_double(x[offset(p, c)]) - mu;
            squares += counts(p) ? d * d : 0;
        }
        // A lane sums 1024 float values before the sum is added up in double: an error of at most 1024 * 2^-24 of it.
        hold("mean", mean[c], mu, 1e-4);
        hold("var", var[c], squares / m, 1e-4 * squares / m);
        means[c] = mu;
        inverses[c] = 1 / sqrt(squares / m + call.eps);
        for (int64_t p = 0; p < positions; ++p) {
            const int64_t i = offset(p, c);
            double z = (to_double(x[i]) - mu) * inverses[c] * weight[c] + bias[c] + (residual ? to_double(other[i]) : 0);
            if (fabs(z) < 1e-4) assign(dy[i], 0);  // either side of the kink is right
            if (activation != NONE && z < 0) z *= slope;
            hold("y", to_double(y[i]), counts(p) ? z : 0, unit * (8 + fabs(z)));
        }
    }
    call.other = residual ? y : nullptr;
    call.dy = dy;
    call.out = dx;
    call.dresidual = residual ? dr : nullptr;
    call.dweight = dweight;
    call.dbias = dbias;
    if (bn_backward(&call)) hold("memory", 1, 0, 0);
    for (int64_t c = 0; c < C; ++c) {
        auto gradient = [&](int64_t p) {
            const int64_t i = offset(p, c);
            const double x_hat = (to_double(x[i]) - means[c]) * inverses[c];
            const double z = x_hat * weight[c] + bias[c] + (residual ? to_double(other[i]) : 0);
            return !counts(p) ? 0 : to_double(dy[i]) * (activation == NONE || z > 0 ? 1 : slope);
        };
        double first = 0, second = 0;
        for (int64_t p = 0; p < positions; ++p) {
            const double dz = gradient(p);
            first += dz;
            second += dz * (to_double(x[offset(p, c)]) - means[c]) * inverses[c];
        }
        hold("dbias", dbias[c], first, 1e-6 * m + 1e-5);
        hold("dweight", dweight[c], second, 1e-6 * m + 1e-5);
        for (int64_t p = 0; p < positions; ++p) {
            const int64_t i = offset(p, c);
            const double dz = gradient(p), hat = (to_double(x[i]) - means[c]) * inverses[c];
            const double want = counts(p) ? weight[c] * inverses[c] * (dz - first / m - hat * second / m) : 0;
            const double size = fabs(weight[c] * inverses[c]) * (4 + fabs(hat));
            hold("dx", to_double(dx[i]), want, unit * (fabs(want) + size));
            if (residual) hold("dresidual", to_double(dr[i]), dz, unit * (1 + fabs(dz)));
        }
    }
    ++cases;
    if (wrong > before)
        printf("dtype %d rows %d shape %d %d %d activation %d residual %d mask %d threads %u\n", (int)dtype, (int)s.rows,
               (int)s.samples, (int)C, (int)s.length, activation, residual, masked, threads);
    void *all[] = {x, other, dy, y, dx, dr, mask, weight, bias, mean, var, dweight, dbias, means, inverses};
    for (void *one : all) free(one);
}

int main() {
    const Shape small[] = {{0, 3, 5, 2}, {0, 3, 17, 49}, {0, 2, 3, 5001}, {1, 7, 1, 1}, {1, 37, 13, 1}, {1, 150, 70, 1},
                           {1, 2003, 3, 1}};
    bn_use_threads(in_turn, count_threads);
    for (const Shape &s : small)
        for (int activation = NONE; activation <= LEAKY_RELU; ++activation)
            for (int with = 0; with < 4; ++with) {
                threads = 1;
                check<float>(FLOAT32, 0x1p-20, s, activation, with & 1, with & 2);
                check<double>(FLOAT64, 0x1p-44, s, activation, with & 1, with & 2);
                check<BFloat16>(BFLOAT16, 0x1p-8, s, activation, with & 1, with & 2);
                check<Half>(FLOAT16, 0x1p-11, s, activation, with & 1, with & 2);
            }
    // Work that threads divide, and outputs that are streamed past the cache.
    const Shape large[] = {{0, 3, 2, 100003}, {1, 4001, 160, 1}, {0, 2, 11, 100003}, {1, 16411, 128, 1}};
    for (const Shape &s : large) {
        threads = 3;
        check<float>(FLOAT32, 0x1p-20, s, RELU, true, false);
    }
    printf("%s: %d cases, %d wrong\n", bn_instructions(), cases, wrong);
    return wrong != 0;
}
