// Replaces the management library libnvidia-ml: the functions that the caching allocator calls before it uses virtual
// memory. No GPU is part of a fabric: the allocator's buffers contain zeros, which already mean that. All functions
// return success.
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) { *device = (void*)64; return 0; }
int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return 0; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, int* type) { *type = 0; return 0; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return 0; }
int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) { *count = 0; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = 13000; return 0; }
}
