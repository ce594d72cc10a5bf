/* SiLU of layer normalisation, forward and backward, in one pass over memory each. Rows of n values lie end to end.
   Values are float, or bfloat16 where VALUE says so; statistics and sums are float. NaN and infinity pass through. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t value;
static inline float get(const value *x, long j) {
    union { uint32_t i; float f; } u = {.i = (uint32_t)x[j] << 16};
    return u.f;
}
static inline void set(value *x, long j, float f) {
    union { float f; uint32_t i; } u = {.f = f};
    uint32_t rounded = (u.i + 0x7fff + ((u.i >> 16) & 1)) >> 16; /* to the nearest, ties to even */
    x[j] = (uint16_t)(f != f ? 0x7fc0 : rounded);
}
#else
typedef float value;
static inline float get(const value *x, long j) { return x[j]; }
static inline void set(value *x, long j, float f) { x[j] = f; }
#endif

#define SHORT inline __attribute__((always_inline))
enum { BLOCK = 64 }; /* rows whose gradients are added up before they join the sum of all: keeps that sum exact */

/* To 2 units in the last place: the compiler makes vectors of it, which it cannot of expf. */
static SHORT float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power = {.i = ((int32_t)n + 127) << 23};
    return p * power.f;
}

static SHORT void rows_forward(
    long rows, long n, float eps, const value *restrict x, const float *restrict weight, const float *restrict bias,
    value *restrict y, float *restrict stats) {
    for (long i = 0; i < rows; i++, x += n, y += n, stats += 2) {
        float sum = 0, square = 0;
        for (long j = 0; j < n; j++) sum += get(x, j);
        float mean = sum / n;
        for (long j = 0; j < n; j++) square += (get(x, j) - mean) * (get(x, j) - mean);
        float scale = 1 / sqrtf(square / n + eps);
        stats[0] = mean, stats[1] = scale;
        for (long j = 0; j < n; j++) {
            float z = (get(x, j) - mean) * scale * weight[j] + bias[j];
            set(y, j, z / (1 + exponential(-z)));
        }
    }
}

/* block: [2, n], of zeros: where the gradients of weight and bias are added up. */
static SHORT void rows_backward(
    long rows, long n, const value *restrict x, const float *restrict weight, const float *restrict bias,
    const float *restrict stats, const value *restrict grad, value *restrict out, float *restrict h,
    float *restrict inner, float *restrict block) {
    for (long i = 0; i < rows; i++, x += n, grad += n, out += n, stats += 2) {
        float mean = stats[0], scale = stats[1], sum = 0, dot = 0;
        for (long j = 0; j < n; j++) {
            h[j] = (get(x, j) - mean) * scale;
            float z = h[j] * weight[j] + bias[j];
            float gate = 1 / (1 + exponential(-z));
            inner[j] = get(grad, j) * gate * (1 + z * (1 - gate));
            block[j] += inner[j] * h[j], block[n + j] += inner[j];
            inner[j] *= weight[j];
            sum += inner[j], dot += inner[j] * h[j];
        }
        sum /= n, dot /= n;
        for (long j = 0; j < n; j++) set(out, j, scale * (inner[j] - sum - h[j] * dot));
    }
}

/* The same for short rows, whose arrays the compiler keeps in registers. */
static SHORT void short_backward(
    long rows, long n, const value *restrict x, const float *restrict weight, const float *restrict bias,
    const float *restrict stats, const value *restrict grad, value *restrict out, float *restrict sums) {
    float h[32], inner[32], block[64] = {0};
    rows_backward(rows, n, x, weight, bias, stats, grad, out, h, inner, block);
    for (long j = 0; j < 2 * n; j++) sums[j] += block[j];
}

/* x, y [rows, n]; weight, bias [n]; stats [rows, 2]: mean and 1 / standard deviation. */
void norm_silu_forward(
    long rows, long n, float eps, const value *x, const float *weight, const float *bias, value *y, float *stats) {
    switch (n) { /* what the compiler knows of short rows makes them several times faster */
    case 8: rows_forward(rows, 8, eps, x, weight, bias, y, stats); break;
    case 16: rows_forward(rows, 16, eps, x, weight, bias, y, stats); break;
    case 32: rows_forward(rows, 32, eps, x, weight, bias, y, stats); break;
    default: rows_forward(rows, n, eps, x, weight, bias, y, stats);
    }
}

/* out [rows, n]: the gradient of x. work [6, n], of zeros: rows 0 and 1 become the gradients of weight and bias. */
void norm_silu_backward(
    long rows, long n, const value *x, const float *weight, const float *bias, const float *stats, const value *grad,
    value *out, float *work) {
    float *block = work + 2 * n, *h = work + 4 * n, *inner = work + 5 * n;
    for (long i = 0; i < rows; i += BLOCK) {
        long m = rows - i < BLOCK ? rows - i : BLOCK;
        const value *xs = x + i * n, *grads = grad + i * n;
        switch (n) {
        case 8: short_backward(m, 8, xs, weight, bias, stats + 2 * i, grads, out + i * n, work); break;
        case 16: short_backward(m, 16, xs, weight, bias, stats + 2 * i, grads, out + i * n, work); break;
        case 32: short_backward(m, 32, xs, weight, bias, stats + 2 * i, grads, out + i * n, work); break;
        default:
            rows_backward(m, n, xs, weight, bias, stats + 2 * i, grads, out + i * n, h, inner, block);
            for (long j = 0; j < 2 * n; j++) work[j] += block[j];
            memset(block, 0, 2 * n * sizeof(float));
        }
    }
}
