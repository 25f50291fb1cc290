/* A CUDA driver without a GPU, for tests/hardware/test_shadow.py. It logs what the calls receive and
 * "runs" a few kernels by their names: copy (u32 words from parameter 0 to parameter 1), wrong (the
 * same with a flipped bit in word 3), store (parameter 1 to the variable `word`), fault, hang. */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
enum {
  kOk = 0,
  kInvalid = 1,
  kInvalidPtx = 218,
  kUnsupportedVersion = 222,
  kNotFound = 500,
  kNotReady = 600,
  kFault = 700
};

typedef struct {
  char* image;
  uint32_t word;
} Module;

typedef struct {
  Module* module;
  char name[64];
} Function;

typedef struct {
  unsigned id, pad, value[16];
} Attribute;

typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
} Config;

static Result pending = kOk;

static void say(const char* format, ...) {
  FILE* log = fopen(getenv("FAKE_CUDA_LOG"), "a");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(log, format, arguments);
  va_end(arguments);
  fclose(log);
}

Result cuInit(unsigned flags) {
  return flags ? kInvalid : kOk;
}
Result cuGetErrorString(Result error, const char** text) {
  *text = error == kFault ? "an illegal memory access" : "a fake error";
  return kOk;
}
Result cuDeviceGet(int* device, int ordinal) {
  *device = ordinal + 7;
  return kOk;
}
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != 7) return kInvalid;
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : -1;
  return *value < 0 ? kInvalid : kOk;
}
Result cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)0x1234567812345678;
  return device == 7 ? kOk : kInvalid;
}
Result cuCtxSetCurrent(void* context) {
  return context == (void*)0x1234567812345678 ? kOk : kInvalid;
}

Result cuModuleLoadDataEx(Module** module, const char* image, unsigned n, const int* options,
                          void** values) {
  if (n != 4 || options[0] != 3 || options[1] != 4 || options[2] != 5 || options[3] != 6)
    return kInvalid;
  if (strstr(image, "REFUSED")) {
    snprintf(values[2], (size_t)values[3], "line 1: a fake message");
    return kInvalidPtx;
  }
  if (strstr(image, "TOO NEW")) return kUnsupportedVersion;
  *module = calloc(1, sizeof(Module));
  (*module)->image = strdup(image);
  (*module)->word = 5;
  return kOk;
}
Result cuModuleUnload(Module* module) {
  free(module->image);
  free(module);
  return kOk;
}
Result cuModuleGetFunction(Function** function, Module* module, const char* name) {
  if (!strstr(module->image, name)) return kNotFound;
  *function = calloc(1, sizeof(Function));
  (*function)->module = module;
  snprintf((*function)->name, sizeof(*function)->name, "%s", name);
  return kOk;
}
Result cuModuleGetGlobal_v2(uint64_t* address, size_t* size, Module* module, const char* name) {
  if (strcmp(name, "word")) return kNotFound;
  *address = (uint64_t)&module->word;
  *size = sizeof module->word;
  return kOk;
}

Result cuLinkCreate_v2(unsigned n, const int* options, void** values, char** state) {
  if (n != 4 || options[3] != 6 || (size_t)values[3] < 1000) return kInvalid;
  *state = calloc(1, 1 << 20);
  return kOk;
}
Result cuLinkAddData_v2(char* state, int type, const char* data, size_t size, const char* name,
                        unsigned n, const int* options, void** values) {
  if (type != 1 || n || options || values || strlen(data) + 1 != size) return kInvalid;
  say("link %s\n", name);
  strcat(state, data);
  return kOk;
}
Result cuLinkComplete(char* state, void** image, size_t* size) {
  *image = state;
  *size = strlen(state) + 1;
  return kOk;
}
Result cuLinkDestroy(char* state) {
  free(state);
  return kOk;
}

Result cuMemAlloc_v2(uint64_t* address, size_t size) {
  *address = (uint64_t)aligned_alloc(256, (size + 255) / 256 * 256);
  return size ? kOk : kInvalid;
}
Result cuMemFree_v2(uint64_t address) {
  free((void*)address);
  return kOk;
}
Result cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) {
  memcpy((void*)to, from, size);
  return pending;
}
Result cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  memcpy(to, (void*)from, size);
  return pending;
}

Result cuFuncSetAttribute(Function* function, int attribute, int value) {
  say("%s attribute %d = %d\n", function->name, attribute, value);
  return kOk;
}
Result cuLaunchKernelEx(const Config* c, Function* function, void** parameters, void** extra) {
  if (extra || c->stream) return kInvalid;
  say("%s grid %u %u %u block %u %u %u shared %u", function->name, c->grid[0], c->grid[1],
      c->grid[2], c->block[0], c->block[1], c->block[2], c->shared);
  for (unsigned i = 0; i < c->count; i++) {
    const Attribute* a = &c->attributes[i];
    say(" [%u: %u %u %u]", a->id, a->value[0], a->value[1], a->value[2]);
  }
  say("\n");
  if (!strcmp(function->name, "fault")) pending = kFault;
  if (!strcmp(function->name, "hang")) pending = kNotReady;
  if (!strcmp(function->name, "store")) function->module->word += **(uint32_t**)parameters[0];
  if (!strcmp(function->name, "copy") || !strcmp(function->name, "wrong")) {
    const uint32_t* from = *(uint32_t**)parameters[0];
    uint32_t* to = *(uint32_t**)parameters[1];
    memcpy(to, from, 4 * c->block[0]);
    if (function->name[0] == 'w') to[3] ^= 1;
  }
  return kOk;
}

Result cuEventCreate(void** event, unsigned flags) {
  *event = (void*)0x99;
  return flags == 2 ? kOk : kInvalid;
}
Result cuEventRecord(void* event, void* stream) {
  return event == (void*)0x99 && !stream ? kOk : kInvalid;
}
Result cuEventQuery(void* event) {
  return event == (void*)0x99 ? pending : kInvalid;
}

Result cuTensorMapEncodeTiled(uint8_t* map, int type, unsigned rank, uint64_t address,
                              const uint64_t* dim, const uint64_t* strides, const unsigned* box,
                              const unsigned* element_strides, int interleave, int swizzle,
                              int promotion, int fill) {
  if ((uint64_t)map % 64 || address % 16) return kInvalid;
  say("map type %d rank %u dim %lu %lu stride %lu box %u %u steps %u %u %d %d %d %d\n", type, rank,
      dim[0], dim[1], strides[0], box[0], box[1], element_strides[0], element_strides[1],
      interleave, swizzle, promotion, fill);
  memset(map, 0x11, 128);
  return kOk;
}
