/* A libcuda whose GPU computes nothing: modules load, launches are counted by kernel, and memory is never touched.

   Attributes are those of a Hopper GPU, so that whatever fits one is launched. */

#include <cuda.h>
#include <string.h>

#define MAX_FUNCTIONS 8192

static struct function {
  char name[256];
  long long launches;
  long long programs;
} functions[MAX_FUNCTIONS];
static int num_functions = 0;

int stub_num_functions(void) { return num_functions; }
const char *stub_name(int i) { return functions[i].name; }
long long stub_launches(int i) { return functions[i].launches; }
long long stub_programs(int i) { return functions[i].programs; }

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) {
  *version = 12080;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    *value = 132;
    break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    *value = 9;
    break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    *value = 0;
    break;
  default:
    *value = 232448;
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "the stub knows no errors";
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (num_functions == MAX_FUNCTIONS)
    return CUDA_ERROR_OUT_OF_MEMORY;
  strncpy(functions[num_functions].name, name, sizeof(functions[0].name) - 1);
  *function = (CUfunction)&functions[num_functions++];
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 32;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(data, &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned int num, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer) {
  for (unsigned int i = 0; i < num; ++i)
    if (attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
      memcpy(data[i], &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  struct function *launched = (struct function *)function;
  launched->launches += 1;
  launched->programs += (long long)config->gridDimX * config->gridDimY * config->gridDimZ;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *num, CUfunction function, const CUlaunchConfig *config) {
  *num = 1;
  return CUDA_SUCCESS;
}
