/* Stands for libcuda where there is no GPU: launches are printed, everything else succeeds. */
#include <stdio.h>

#define SUCCEEDS(name) int name() { return 0; }
SUCCEEDS(cuCtxGetDevice) SUCCEEDS(cuCtxGetLimit) SUCCEEDS(cuCtxPopCurrent_v2)
SUCCEEDS(cuCtxPushCurrent_v2) SUCCEEDS(cuCtxSetCurrent) SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuDeviceGet) SUCCEEDS(cuDevicePrimaryCtxRetain) SUCCEEDS(cuDevicePrimaryCtxRetain_v2)
SUCCEEDS(cuFuncSetAttribute) SUCCEEDS(cuFuncSetCacheConfig) SUCCEEDS(cuInit)
SUCCEEDS(cuModuleUnload) SUCCEEDS(cuOccupancyMaxActiveClusters) SUCCEEDS(cuPointerGetAttribute)
SUCCEEDS(cuStreamIsCapturing) SUCCEEDS(cuTensorMapEncodeIm2col) SUCCEEDS(cuTensorMapEncodeTiled)

int cuModuleLoadData(void **module, void *image) { *module = (void *)2; return 0; }
int cuModuleGetFunction(void **function, void *module, char *name) { *function = (void *)3; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "stub"; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int which, void *function) { *value = which ? 0 : 1024; return 0; }

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **arguments, void **extra) {
  printf("grid %u stream %p pointers %p %p\n", x, stream, *(void **)arguments[0],
         *(void **)arguments[1]);
  fflush(stdout);
  return 0;
}

/* grid, block, bytes of shared memory; then the stream */
struct config { unsigned x, y, z, bx, by, bz, shared; void *stream; };

int cuLaunchKernelEx(const struct config *c, void *function, void **arguments, void **extra) {
  return cuLaunchKernel(function, c->x, c->y, c->z, c->bx, c->by, c->bz, c->shared, c->stream,
                        arguments, extra);
}
