// A CUDA driver without a GPU: memory is the host's, modules are any files, kernels do nothing. What is launched,
// filled and encoded goes to hooks, where a test has set them.
#include "cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct CUmod_st {
  int num_functions;
};
struct CUfunc_st {  // a test reads the name through the handle
  char name[256];
  int shared_limit;
};

int fake_major = 9, fake_minor = 0, fake_multiprocessors = 132, fake_has_context = 1, fake_modules = 0;
CUresult (*fake_launch)(CUfunction, const unsigned*, const unsigned*, unsigned, CUstream, void**);
CUresult (*fake_fill)(CUdeviceptr, unsigned, size_t, CUstream);
CUresult (*fake_encode)(CUtensorMap*, int, unsigned, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                        const cuuint32_t*, const int*);

static void* memory(CUdeviceptr address) { return (void*)(uintptr_t)address; }

CUresult cuInit(unsigned flags) { return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }

CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = error == CUDA_ERROR_FILE_NOT_FOUND    ? "CUDA_ERROR_FILE_NOT_FOUND"
          : error == CUDA_ERROR_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
          : error == CUDA_ERROR_INVALID_VALUE   ? "CUDA_ERROR_INVALID_VALUE"
                                                : NULL;
  return *name != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT           ? fake_multiprocessors
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? fake_major
                                                                           : fake_minor;
  return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)(uintptr_t)1;
  return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuCtxSetCurrent(CUcontext context) { return context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return fake_has_context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuCtxSynchronize(void) { return CUDA_SUCCESS; }

CUresult cuModuleLoad(CUmodule* module, const char* path) {
  FILE* file = fopen(path, "rb");
  if (file == NULL) return CUDA_ERROR_FILE_NOT_FOUND;
  fclose(file);
  *module = calloc(1, sizeof **module);
  ++fake_modules;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  free(module);
  --fake_modules;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (strcmp(name, "missing") == 0) return CUDA_ERROR_NOT_FOUND;
  ++module->num_functions;
  *function = calloc(1, sizeof **function);  // lives as long as the process, as a test may look at it later
  snprintf((*function)->name, sizeof (*function)->name, "%s", name);
  (*function)->shared_limit = 48 * 1024;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  function->shared_limit = value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** params,
                        void** extra) {
  const unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
  if (extra != NULL || (int)shared_bytes > function->shared_limit) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 3; ++i)
    if (grid[i] == 0 || block[i] == 0 || grid[i] > (i == 0 ? 2147483647u : 65535u)) return CUDA_ERROR_INVALID_VALUE;
  return fake_launch ? fake_launch(function, grid, block, shared_bytes, stream, params) : CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const int modes[] = {interleave, swizzle, promotion, fill};
  if ((uintptr_t)map % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
  return fake_encode ? fake_encode(map, type, rank, address, sizes, strides, box, steps, modes) : CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr* address, size_t num_bytes) {
  *address = (CUdeviceptr)(uintptr_t)aligned_alloc(512, (num_bytes + 511) / 512 * 512);
  return *address != 0 ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemFree(CUdeviceptr address) {
  free(memory(address));
  return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoD(CUdeviceptr target, const void* source, size_t num_bytes) {
  memcpy(memory(target), source, num_bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoH(void* target, CUdeviceptr source, size_t num_bytes) {
  memcpy(target, memory(source), num_bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemsetD8(CUdeviceptr address, unsigned char value, size_t count) {
  memset(memory(address), value, count);
  return CUDA_SUCCESS;
}
CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t count, CUstream stream) {
  if (fake_fill) return fake_fill(address, value, count, stream);
  return cuMemsetD8(address, value, count);
}
CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream stream) {
  (void)stream;
  for (size_t i = 0; i < count; ++i) ((unsigned*)memory(address))[i] = value;
  return CUDA_SUCCESS;
}
CUresult cuMemsetD2D16Async(CUdeviceptr address, size_t pitch, unsigned short value, size_t width, size_t height,
                            CUstream stream) {
  (void)stream;
  if (pitch < width * 2) return CUDA_ERROR_INVALID_VALUE;
  for (size_t y = 0; y < height; ++y)
    for (size_t x = 0; x < width; ++x) ((unsigned short*)memory(address + y * pitch))[x] = value;
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  *stream = (CUstream)(uintptr_t)2;
  return flags == CU_STREAM_NON_BLOCKING ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuStreamDestroy(CUstream stream) { return stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuStreamSynchronize(CUstream stream) { return stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
  return stream && mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  *graph = (CUgraph)(uintptr_t)4;
  return stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long flags) {
  *executable = (CUgraphExec)(uintptr_t)5;
  return graph && flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  return executable && stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGraphExecDestroy(CUgraphExec executable) { return executable ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuGraphDestroy(CUgraph graph) { return graph ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuEventCreate(CUevent* event, unsigned flags) {
  *event = (CUevent)(uintptr_t)3;
  return flags == CU_EVENT_DEFAULT ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuEventDestroy(CUevent event) { return event ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuEventRecord(CUevent event, CUstream stream) {
  return event && stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuEventElapsedTime(float* milliseconds, CUevent before, CUevent after) {
  *milliseconds = 1.0f;
  return before && after ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
