// A CUDA runtime without a GPU, which replaces libcudart.
//
// - Kernels compute nothing; each launch is counted by the kernel's name.
// - Device memory is address space without access: code on the host that reads or writes it crashes, as on a real machine.
//   Data that is copied to the device is dropped; a copy back to the host writes zeros. So a simulated run of any size
//   fits into a small machine, and reads zeros whenever it waits for a result.
// - Pinned memory is ordinary memory of the host.
// All other functions of the library are generated: they return 0 (success) and are counted, see build.py.
//
// Environment: SIM_GPU_CARD (H100, A100, ...), SIM_GPU_COUNT, SIM_GPU_GIB (memory of each GPU), SIM_GPU_DRIVER (version of
// the driver: below 13000 there are no devices), SIM_GPU_NO_LOCKED_MEMORY=1 (cudaHostRegister fails, as it does if the
// limit of locked memory is low).
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "simulated.h"

namespace {

constexpr Card CARDS[] = {
    {"H100", "NVIDIA H100 80GB HBM3", 90, 132, 2048, 232448, 80},
    {"A100", "NVIDIA A100-SXM4-80GB", 80, 108, 2048, 166912, 80},
    {"L4", "NVIDIA L4", 89, 58, 1536, 101376, 22},
    {"T4", "Tesla T4", 75, 40, 1024, 65536, 15},
    {"B200", "NVIDIA B200", 100, 148, 2048, 232448, 180},
    {"RTX5090", "NVIDIA GeForce RTX 5090", 120, 170, 1536, 101376, 32},
};
constexpr size_t PAGE = 4096;
constexpr size_t LARGE = 1 << 20;  // for at least this many bytes, zeros in pinned memory use no physical memory

struct Counter {
  long number = 0, bytes = 0;
};
struct Block {
  size_t size;
  cudaMemoryType kind;
  int device;
  bool ours;  // allocated by mmap in this file, not registered by the caller
};

std::mutex mutex;
// These objects are never destroyed: kernels are registered before, and counted after the lifetime of static objects.
std::map<std::string, Counter>& counters() { static auto* m = new std::map<std::string, Counter>; return *m; }
std::unordered_map<const void*, std::string>& kernels() {
  static auto* m = new std::unordered_map<const void*, std::string>;
  return *m;
}
std::map<char*, Block>& blocks() { static auto* m = new std::map<char*, Block>; return *m; }
std::atomic<long> launches{0};
std::atomic<size_t> used[64];
std::atomic<long> next_handle{4096};
thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;

long setting(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value ? atol(value) : otherwise;
}
size_t memory_of_card() { return (size_t)setting("SIM_GPU_GIB", sim_card()->memory_gib) << 30; }
bool old_driver() { return setting("SIM_GPU_DRIVER", 13000) < 13000; }

bool find(const void* pointer, Block* block) {
  std::lock_guard<std::mutex> guard(mutex);
  auto it = blocks().upper_bound((char*)pointer);
  if (it == blocks().begin()) return false;
  --it;
  if ((char*)pointer >= it->first + it->second.size) return false;
  *block = it->second;
  return true;
}

void* allocate(size_t size, cudaMemoryType kind) {
  int access = kind == cudaMemoryTypeDevice ? PROT_NONE : PROT_READ | PROT_WRITE;
  void* pointer = mmap(nullptr, size ? size : 1, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pointer == MAP_FAILED) return nullptr;
  std::lock_guard<std::mutex> guard(mutex);
  blocks()[(char*)pointer] = {size, kind, device, true};
  if (kind == cudaMemoryTypeDevice) used[device] += size;
  return pointer;
}

void release_zero_pages(char* start, size_t size) {  // pages of private anonymous memory, which still read as zeros afterwards
  char* first = (char*)(((size_t)start + PAGE - 1) & ~(PAGE - 1));
  char* end = (char*)(((size_t)start + size) & ~(PAGE - 1));
  if (first < end) madvise(first, end - first, MADV_DONTNEED);
}

void write_zeros(void* to, size_t size, bool locked) {
  if (locked && size >= LARGE) {
    char* first = (char*)(((size_t)to + PAGE - 1) & ~(PAGE - 1));
    char* end = (char*)(((size_t)to + size) & ~(PAGE - 1));
    memset(to, 0, first - (char*)to);
    madvise(first, end - first, MADV_DONTNEED);
    memset(end, 0, (char*)to + size - end);
  } else {
    memset(to, 0, size);
  }
}

cudaError_t copy(void* to, const void* from, size_t size, bool blocks_host) {
  Block a, b;
  bool to_known = find(to, &a), from_known = find(from, &b);
  bool to_device = to_known && a.kind == cudaMemoryTypeDevice, from_device = from_known && b.kind == cudaMemoryTypeDevice;
  const char* way = "host to host";
  if (to_device && from_device) way = "device to device";
  else if (to_device) way = from_known ? "host to device, pinned" : "host to device, pageable";
  else if (from_device) way = to_known ? "device to host, pinned" : "device to host, pageable";
  count(std::string("copy ") + way, size);
  launches++;
  if (blocks_host) count("wait cudaMemcpy");
  if (!to_device && from_device) write_zeros(to, size, to_known);
  if (!to_device && !from_device) memmove(to, from, size);
  return cudaSuccess;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared) {
  std::string name = "?";
  {
    std::lock_guard<std::mutex> guard(mutex);
    auto it = kernels().find(function);
    if (it != kernels().end()) name = it->second;
  }
  if (!grid.x || !grid.y || !grid.z || !block.x) {
    fprintf(stderr, "simulated GPU: launch with an empty grid: %s\n", name.c_str());
    return last_error = cudaErrorInvalidConfiguration;
  }
  if (shared > sim_card()->shared_memory_per_block) {
    fprintf(stderr, "simulated GPU: %zu bytes of shared memory are more than the GPU has: %s\n", shared, name.c_str());
    return last_error = cudaErrorInvalidValue;
  }
  count("kernel " + name);
  return cudaSuccess;
}

cudaError_t wait(const char* call) { count(std::string("wait ") + call); return cudaSuccess; }
cudaError_t new_handle(void* handle) { *(long*)handle = next_handle += 64; return cudaSuccess; }
int nothing() { return 0; }

}  // namespace

extern "C" {

// counters, for report.py and the other stand-ins

void sim_count(const char* name, long number, long bytes) {
  if (!strncmp(name, "kernel ", 7)) launches += number;
  std::lock_guard<std::mutex> guard(mutex);
  Counter& counter = counters()[name];
  counter.number += number;
  counter.bytes += bytes;
}

// Kernels, copies and memsets since the process started.
long sim_launches() { return launches; }

void sim_reset() { std::lock_guard<std::mutex> guard(mutex); counters().clear(); }

// Writes lines "number<tab>bytes<tab>name" to `out`. Returns the needed size, including the final zero.
long sim_report(char* out, long size) {
  std::lock_guard<std::mutex> guard(mutex);
  std::string text;
  for (auto& [key, counter] : counters()) {
    std::string name = key;
    int status = 1;
    char* readable = key.rfind("kernel ", 0) ? nullptr : abi::__cxa_demangle(key.c_str() + 7, nullptr, nullptr, &status);
    if (readable) name = std::string("kernel ") + readable;
    free(readable);
    text += std::to_string(counter.number) + "\t" + std::to_string(counter.bytes) + "\t" + name + "\n";
  }
  if ((long)text.size() < size) strcpy(out, text.c_str());
  return text.size() + 1;
}

const Card* sim_card() {
  static const Card* card = [] {
    const char* key = getenv("SIM_GPU_CARD");
    for (const Card& card : CARDS)
      if (key && !strcmp(key, card.key)) return &card;
    if (key) { fprintf(stderr, "SIM_GPU_CARD=%s: unknown GPU model; see CARDS in tests/gpu/sim/runtime/cudart.cpp\n", key); exit(2); }
    return &CARDS[0];
  }();
  return card;
}

int sim_device_count() { return old_driver() ? 0 : setting("SIM_GPU_COUNT", 1); }

// virtual memory management, for the stand-in of the driver

void* sim_reserve(size_t size) {
  void* start = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return start == MAP_FAILED ? nullptr : start;
}
void sim_unreserve(void* start, size_t size) { munmap(start, size); }
bool sim_take_memory(int on, size_t size) {
  if (used[on] + size > memory_of_card()) return false;
  used[on] += size;
  return true;
}
void sim_return_memory(int on, size_t size) { used[on] -= size; }
void sim_map(void* start, size_t size, int on) {
  std::lock_guard<std::mutex> guard(mutex);
  blocks()[(char*)start] = {size, cudaMemoryTypeDevice, on, false};
}
void sim_unmap(void* start, size_t size) {
  std::lock_guard<std::mutex> guard(mutex);
  auto& all = blocks();
  all.erase(all.lower_bound((char*)start), all.lower_bound((char*)start + size));
}

// kernels: the code of nvcc registers each kernel before main, and launches it by the address of its host function

void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
  std::lock_guard<std::mutex> guard(mutex);
  kernels()[function] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<Configuration> configurations;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *(void**)stream = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) { *kernel = (cudaKernel_t)function; return cudaSuccess; }
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return launch(f, grid, block, shared);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return launch((const void*)f, grid, block, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
  return launch(f, c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return launch(f, grid, block, shared);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) { function(data); return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 64;
  a->binaryVersion = a->ptxVersion = sim_card()->capability == 89 ? 86 : sim_card()->capability;  // torch has no binaries for 89
  a->maxDynamicSharedSizeBytes = sim_card()->shared_memory_per_block;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int threads, size_t) {
  *n = threads > 512 ? 1 : 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int threads, size_t, unsigned) {
  *n = threads > 512 ? 1 : 2;
  return cudaSuccess;
}

// devices

cudaError_t cudaGetDeviceCount(int* n) {
  *n = sim_device_count();
  return old_driver() ? cudaErrorInsufficientDriver : cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) { *d = device; return cudaSuccess; }
cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= sim_device_count()) return last_error = cudaErrorInvalidDevice;
  device = d;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { *version = setting("SIM_GPU_DRIVER", 13000); return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int d) {
  const Card* card = sim_card();
  memset(p, 0, sizeof *p);
  strcpy(p->name, card->name);
  p->totalGlobalMem = memory_of_card();
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = card->shared_memory_per_block;
  p->sharedMemPerMultiprocessor = card->shared_memory_per_block + 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = card->capability / 10;
  p->minor = card->capability % 10;
  p->textureAlignment = 512;
  p->multiProcessorCount = card->processors;
  p->maxThreadsPerMultiProcessor = card->threads_per_processor;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = p->managedMemory = p->concurrentKernels = p->cooperativeLaunch = 1;
  p->streamPrioritiesSupported = p->canMapHostMemory = p->hostRegisterSupported = 1;
  p->pciBusID = d;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr attribute, int) {
  const Card* card = sim_card();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *v = card->capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *v = card->capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *v = card->processors; break;
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = card->threads_per_processor; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = card->shared_memory_per_block; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = card->shared_memory_per_block + 1024; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *v = 1024; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *v = 65536; break;
    case cudaDevAttrMaxGridDimX: *v = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *v = 65535; break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *v = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *v = 64; break;
    case cudaDevAttrL2CacheSize: *v = 50 << 20; break;
    case cudaDevAttrClockRate: *v = 1980000; break;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrHostRegisterSupported: *v = 1; break;
    default: *v = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) { snprintf(s, n, "0000:%02x:00.0", d); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* v, int a, int b) { *v = a != b; return cudaSuccess; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { *pool = (cudaMemPool_t)64; return cudaSuccess; }

// streams and events: all work is complete as soon as it is launched

cudaError_t cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize"); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait("cudaStreamSynchronize"); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait("cudaEventSynchronize"); }
cudaError_t cudaEventCreate(cudaEvent_t* e) { return new_handle(e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return new_handle(e); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 0; return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t* s) { return new_handle(s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return new_handle(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return new_handle(s); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { *p = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  *s = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long* id, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* n) {
  if (s) *s = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (n) *n = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode*) { return cudaSuccess; }

// memory

cudaError_t cudaMalloc(void** p, size_t n) {
  count("allocation cudaMalloc", n);
  if (used[device] + n > memory_of_card()) return last_error = cudaErrorMemoryAllocation;
  *p = allocate(n, cudaMemoryTypeDevice);
  return *p ? cudaSuccess : last_error = cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  Block block;
  {
    std::lock_guard<std::mutex> guard(mutex);
    auto it = blocks().find((char*)p);
    if (it == blocks().end() || !it->second.ours) return last_error = cudaErrorInvalidValue;
    block = it->second;
    blocks().erase(it);
  }
  if (block.kind == cudaMemoryTypeDevice) used[block.device] -= block.size;
  munmap(p, block.size ? block.size : 1);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  count("allocation cudaHostAlloc", n);
  *p = allocate(n, cudaMemoryTypeHost);
  return *p ? cudaSuccess : last_error = cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocHost(void** p, size_t n) { return cudaHostAlloc(p, n, 0); }
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
  count("allocation cudaHostRegister", n);
  if (setting("SIM_GPU_NO_LOCKED_MEMORY", 0)) return last_error = cudaErrorOperatingSystem;
  const char* bytes = (const char*)p;
  if (n >= LARGE && !bytes[0] && !memcmp(bytes, bytes + 1, n - 1)) release_zero_pages((char*)p, n);
  std::lock_guard<std::mutex> guard(mutex);
  blocks()[(char*)p] = {n, cudaMemoryTypeHost, device, false};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  std::lock_guard<std::mutex> guard(mutex);
  blocks().erase((char*)p);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** to, void* p, unsigned) { *to = p; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  *total = memory_of_card();
  *unused = *total - used[device];
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  a->hostPointer = (void*)p;
  Block block;
  if (!find(p, &block)) {
    a->type = cudaMemoryTypeUnregistered;
    a->device = -2;
    return cudaSuccess;
  }
  a->type = block.kind;
  a->device = block.device;
  a->devicePointer = (void*)p;
  if (block.kind == cudaMemoryTypeDevice) a->hostPointer = nullptr;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** p, const void*) {
  static void* symbols = allocate(1 << 20, cudaMemoryTypeDevice);
  *p = symbols;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) { return copy(to, from, n, true); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, n, false);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t) {
  return copy(to, from, n, false);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind, cudaStream_t) {
  Block block;
  bool to_device = find(to, &block) && block.kind == cudaMemoryTypeDevice;
  bool from_device = find(from, &block) && block.kind == cudaMemoryTypeDevice;
  count("copy of rows", width * height);
  launches++;
  for (size_t row = 0; row < height && !to_device; row++) {
    char* line = (char*)to + row * to_pitch;
    if (from_device) memset(line, 0, width);
    else memmove(line, (const char*)from + row * from_pitch, width);
  }
  return cudaSuccess;
}
cudaError_t cudaMemset(void*, int, size_t n) { count("memset", n); launches++; return cudaSuccess; }
cudaError_t cudaMemsetAsync(void*, int, size_t n, cudaStream_t) { count("memset", n); launches++; return cudaSuccess; }

// errors, and the functions of the driver that torch looks up by name

cudaError_t cudaGetLastError() { cudaError_t e = last_error; last_error = cudaSuccess; return e; }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t e) {
  static thread_local char text[64];
  snprintf(text, sizeof text, e == cudaErrorMemoryAllocation ? "out of memory" : "error %d of the simulated GPU", (int)e);
  return text;
}
const char* cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             enum cudaDriverEntryPointQueryResult* result) {
  count(std::string("call ") + name);
  void* found = dlsym(RTLD_DEFAULT, name);
  *function = found ? found : (void*)nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
