// Calls as nvcc writes them, for test_calls.py: function pointers in variables and structs, virtual
// functions, recursion with local arrays, structs by value, the device heap, alloca, printf.
#include <cassert>
#include <cstdio>

struct Shape {
  __device__ virtual float area() const = 0;
  __device__ virtual ~Shape() {}
};
struct Square : Shape {
  float side;
  __device__ explicit Square(float x) : side(x) {}
  __device__ float area() const override { return side * side; }
};
struct Circle : Shape {
  float radius;
  __device__ explicit Circle(float x) : radius(x) {}
  __device__ float area() const override { return 3 * radius * radius; }
};

using Function = int (*)(int);
__device__ __noinline__ int twice(int x) {
  return 2 * x;
}
__device__ __noinline__ int square(int x) {
  return x * x;
}
__device__ Function table[2] = {twice, square};
__constant__ Function constant_table[2] = {square, twice};
struct Tagged {
  int tag;
  Function function;
};
__device__ Tagged tagged[2] = {{1, twice}, {2, square}};

__device__ int fibonacci(int n) {
  int before[2] = {n - 1, n - 2};
  if (n < 2) return n;
  int sum = 0;
  for (int i = 0; i < 2; ++i) sum += fibonacci(before[i]);
  return sum;
}

struct Big {
  int v[8];
};
__device__ __noinline__ Big make(int x) {
  Big b;
  for (int i = 0; i < 8; ++i) b.v[i] = x + i;
  return b;
}
__device__ __noinline__ int sum(Big b) {
  int s = 0;
  for (int i = 0; i < 8; ++i) s += b.v[i];
  return s;
}

extern "C" __global__ void calls(int* out) {
  const int t = threadIdx.x;
  out[t] = table[t & 1](t);
  out[32 + t] = constant_table[t & 1](t);
  out[64 + t] = tagged[t & 1].function(t) + tagged[t & 1].tag;
  out[96 + t] = fibonacci(t % 7);
  out[128 + t] = sum(make(t));
}

extern "C" __global__ void virtual_calls(float* out) {
  const int t = threadIdx.x;
  Shape* s;
  if (t & 1)
    s = new Square(t);
  else
    s = new Circle(t);
  out[t] = s->area();
  delete s;
}

extern "C" __global__ void keep(int** kept) {
  const int t = threadIdx.x;
  kept[t] = static_cast<int*>(malloc(4 * (t + 1)));
  for (int i = 0; i <= t; ++i) kept[t][i] = i;
}

extern "C" __global__ void release(int** kept, int* out) {
  const int t = threadIdx.x;
  out[t] = kept[t][t];
  free(kept[t]);
}

extern "C" __global__ void variable_length(int* out, int n) {
  int* a = static_cast<int*>(alloca(n * 4));
  for (int i = 0; i < n; ++i) a[i] = i + threadIdx.x;
  int s = 0;
  for (int i = 0; i < n; ++i) s += a[i];
  out[threadIdx.x] = s;
}

extern "C" __global__ void prints(int n) {
  printf("%d %s %.2f %lld %hhd %5u|\n", n, "x", 1.5, 5ll, 257, 7u);
  assert(n < 5);
}
