// NCCL without a GPU: communicators are created, and messages are counted with the bytes that leave this rank on a ring.
//
// A process alone cannot know how many ranks are in its communicator after a split. So the ranks write their colors to
// files in the shared folder SIM_GPU_FOLDER, and wait there for the files of all ranks, as NCCL waits for the ranks.
#include <nccl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>

#include "simulated.h"

namespace {

struct Communicator {
  std::string id;  // the same on all ranks of this communicator, different for each communicator
  int ranks, rank;
  int splits = 0;
};

long size_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return 1;
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    default: return 8;
  }
}

ncclResult_t message(const char* kind, double bytes, ncclComm_t comm) {
  count("message " + std::string(kind) + " of " + std::to_string(((Communicator*)comm)->ranks), (long)bytes);
  return ncclSuccess;
}

double ranks(ncclComm_t comm) { return ((Communicator*)comm)->ranks; }

ncclResult_t make(ncclComm_t* comm, const std::string& id, int ranks, int rank) {
  *comm = (ncclComm_t) new Communicator{id, ranks, rank};
  return ncclSuccess;
}

}  // namespace

extern "C" {
ncclResult_t ncclGetVersion(int* version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "%08x%08x", std::random_device()(), getpid());
  return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int n, ncclUniqueId id, int rank) { return make(comm, id.internal, n, rank); }
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int n, ncclUniqueId id, int rank, ncclConfig_t*) {
  return make(comm, id.internal, n, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t* comm, int n, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
  return make(comm, ids[0].internal, n, rank);
}
ncclResult_t ncclCommSplit(ncclComm_t from, int color, int key, ncclComm_t* comm, ncclConfig_t*) {
  Communicator* parent = (Communicator*)from;
  const char* folder = getenv("SIM_GPU_FOLDER");
  std::string split = parent->id + "." + std::to_string(parent->splits++);
  auto path = [&](int rank) { return std::string(folder ? folder : "/tmp") + "/split-" + split + "." + std::to_string(rank); };
  std::string mine = path(parent->rank), unfinished = mine + ".new";
  std::ofstream(unfinished) << color << " " << key << std::endl;
  rename(unfinished.c_str(), mine.c_str());
  int same = 0, before = 0;
  for (int rank = 0; rank < parent->ranks; rank++) {
    int its_color = 0, its_key = 0;
    for (int tries = 0; !(std::ifstream(path(rank)) >> its_color >> its_key); tries++) {
      if (tries == 60000) { fprintf(stderr, "simulated NCCL: rank %d did not split\n", rank); return ncclSystemError; }
      usleep(10000);
    }
    same += its_color == color;
    before += its_color == color && (its_key < key || (its_key == key && rank < parent->rank));
  }
  if (color == NCCL_SPLIT_NOCOLOR) { *comm = nullptr; return ncclSuccess; }
  return make(comm, split + "." + std::to_string(color), same, before);
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* result) { *result = ncclSuccess; return ncclSuccess; }
ncclResult_t ncclCommCount(const ncclComm_t comm, int* n) { *n = ((Communicator*)comm)->ranks; return ncclSuccess; }
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) { *rank = ((Communicator*)comm)->rank; return ncclSuccess; }
const char* ncclGetErrorString(ncclResult_t) { return "error of the simulated NCCL"; }
const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclAllGather(const void*, void*, size_t n, ncclDataType_t type, ncclComm_t comm, cudaStream_t) {
  return message("all-gather", n * size_of(type) * (ranks(comm) - 1), comm);
}
ncclResult_t ncclReduceScatter(const void*, void*, size_t n, ncclDataType_t type, ncclRedOp_t, ncclComm_t comm, cudaStream_t) {
  return message("reduce-scatter", n * size_of(type) * (ranks(comm) - 1), comm);
}
ncclResult_t ncclAllReduce(const void*, void*, size_t n, ncclDataType_t type, ncclRedOp_t, ncclComm_t comm, cudaStream_t) {
  return message("all-reduce", 2 * n * size_of(type) * (ranks(comm) - 1) / ranks(comm), comm);
}
ncclResult_t ncclBroadcast(const void*, void*, size_t n, ncclDataType_t type, int, ncclComm_t comm, cudaStream_t) {
  return message("broadcast", n * size_of(type), comm);
}
ncclResult_t ncclAlltoAll(const void*, void*, size_t n, ncclDataType_t type, ncclComm_t comm, cudaStream_t) {
  return message("all-to-all", n * size_of(type) * (ranks(comm) - 1), comm);
}
ncclResult_t ncclSend(const void*, size_t n, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
  return peer == ((Communicator*)comm)->rank ? ncclSuccess : message("send", n * size_of(type), comm);
}
ncclResult_t ncclRecv(void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) { return ncclSuccess; }
ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* op, void*, ncclDataType_t, ncclScalarResidence_t, ncclComm_t) {
  *op = ncclSum;
  return ncclSuccess;
}
}
