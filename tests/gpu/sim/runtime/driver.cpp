// The driver without a GPU, replaces libcuda for Triton and Inductor. Modules can be loaded; kernels compute nothing and
// are counted by name.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "simulated.h"

#undef cuDevicePrimaryCtxGetState

struct Memory {  // what a CUmemGenericAllocationHandle points to
  size_t size;
  int device;
};
struct Kernel {
  std::string name;
};
static CUresult launch(CUfunction function) {
  count("kernel triton: " + ((Kernel*)function)->name);
  return CUDA_SUCCESS;
}
static CUcontext the_context() { return (CUcontext)64; }

extern "C" {
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return (CUresult)cudaDriverGetVersion(version); }
CUresult cuDeviceGet(CUdevice* device, int number) { *device = number; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* n) { *n = sim_device_count(); return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice d) {
  return (CUresult)cudaDeviceGetAttribute(v, (cudaDeviceAttr)a, d);
}
CUresult cuCtxGetCurrent(CUcontext* context) { *context = the_context(); return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return (CUresult)cudaGetDevice(device); }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { *context = the_context(); return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule* module, const char*) { *module = (CUmodule)64; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void*) { *module = (CUmodule)64; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = (CUfunction) new Kernel{name};
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig*, CUfunction function, void**, void**) { return launch(function); }
CUresult cuLaunchKernel(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                        void**, void**) {
  return launch(function);
}
// Virtual memory management: the allocator's expandable segments.
CUresult cuMemAddressReserve(CUdeviceptr* start, size_t size, size_t, CUdeviceptr, unsigned long long) {
  *start = (CUdeviceptr)sim_reserve(size);
  return *start ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemAddressFree(CUdeviceptr start, size_t size) { sim_unreserve((void*)start, size); return CUDA_SUCCESS; }
CUresult cuMemGetAllocationGranularity(size_t* size, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *size = 2 << 20;
  return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp* properties,
                     unsigned long long) {
  int device = properties->location.id;
  if (!sim_take_memory(device, size)) return CUDA_ERROR_OUT_OF_MEMORY;
  count("cuMemCreate", size);
  *handle = (CUmemGenericAllocationHandle) new Memory{size, device};
  return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  Memory* memory = (Memory*)handle;
  sim_return_memory(memory->device, memory->size);
  delete memory;
  return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr start, size_t size, size_t, CUmemGenericAllocationHandle handle, unsigned long long) {
  sim_map((void*)start, size, ((Memory*)handle)->device);
  return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr start, size_t size) { sim_unmap((void*)start, size); return CUDA_SUCCESS; }
CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) { *n = 1; return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) { *text = "error of the simulated driver"; return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult, const char** text) { *text = "error of the simulated driver"; return CUDA_SUCCESS; }
}
