// Shared by the stand-in libraries: the counters and the simulated GPU model. Both are defined in the stand-in of libcudart.
#pragma once
#include <cstddef>
#include <string>

struct Card {
  const char* key;                   // the value of SIM_GPU_CARD
  const char* name;                  // as the driver reports it
  int capability;                    // 90 is sm_90
  int processors;                    // streaming multiprocessors
  int threads_per_processor;
  size_t shared_memory_per_block;    // the largest size that a kernel can request
  size_t memory_gib;
};

extern "C" {
// Adds to the counter `name`: `number` events, which moved `bytes` bytes in total.
void sim_count(const char* name, long number, long bytes);
const Card* sim_card();
int sim_device_count();
// Virtual memory management: ranges of addresses, physical memory, and the mapping of memory to addresses.
void* sim_reserve(size_t size);
void sim_unreserve(void* start, size_t size);
bool sim_take_memory(int device, size_t size);  // false if the GPU has too little free memory
void sim_return_memory(int device, size_t size);
void sim_map(void* start, size_t size, int device);
void sim_unmap(void* start, size_t size);
}

inline void count(const std::string& name, long bytes = 0) { sim_count(name.c_str(), 1, bytes); }
