/* What torch_npu asks of CANN's runtime, on host memory: streams and events are done at once.
 *
 * AQUILA_SIMULATED_NPUS: devices of this machine (1); ASCEND_RT_VISIBLE_DEVICES chooses among them.
 * AQUILA_SIMULATED_CHIP: the name of the chip (Ascend910B3). AQUILA_SIMULATED_GIB: memory of a device (64).
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { DONE = 0, OUT_OF_MEMORY = 207001 };
static char handle[4096];
static _Atomic size_t used;

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

/* ---- device memory ---- */

static size_t capacity(void) { return strtoull(setting("AQUILA_SIMULATED_GIB", "64"), 0, 10) << 30; }

int aclrtMalloc(void **memory, size_t size, int policy) {
    if (used + size > capacity() || posix_memalign(memory, 512, size ? size : 512)) return OUT_OF_MEMORY;
    used += malloc_usable_size(*memory);
    return DONE;
}
int aclrtMallocAlign32(void **memory, size_t size, int policy) { return aclrtMalloc(memory, size, policy); }
int aclrtFree(void *memory) {
    used -= memory ? malloc_usable_size(memory) : 0;
    free(memory);
    return DONE;
}
/* Segments that grow: a range of addresses whose pages the host gives when they are written. */
int aclrtReserveMemAddress(void **address, size_t size, size_t alignment, void *wished, uint64_t flags) {
    *address = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *address == MAP_FAILED ? OUT_OF_MEMORY : DONE;
}
int aclrtMallocPhysical(void **physical, size_t size, const void *property, uint64_t flags) {
    if (used + size > capacity()) return OUT_OF_MEMORY;
    size_t *kept = malloc(sizeof *kept);
    used += *kept = size;
    *physical = kept;
    return DONE;
}
int aclrtFreePhysical(void *physical) {
    used -= *(size_t *)physical;
    free(physical);
    return DONE;
}
int aclrtGetMemInfo(int attribute, size_t *unused, size_t *total) {
    *total = capacity();
    *unused = *total - used;
    return DONE;
}

/* ---- host memory and copies ---- */

int aclrtMallocHost(void **memory, size_t size) {
    return posix_memalign(memory, 512, size ? size : 512) ? OUT_OF_MEMORY : DONE;
}
int aclrtMallocHostWithCfg(void **memory, uint64_t size, void *settings) { return aclrtMallocHost(memory, size); }
int aclrtFreeHost(void *memory) {
    free(memory);
    return DONE;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) {
    memcpy(to, from, size);
    return DONE;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, size, kind);
}
int aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, size, kind);
}
int aclrtMemset(void *to, size_t room, int value, size_t size) {
    memset(to, value, size);
    return DONE;
}
int aclrtMemsetAsync(void *to, size_t room, int value, size_t size, void *stream) {
    return aclrtMemset(to, room, value, size);
}
int aclrtPointerGetAttributes(const void *memory, void *attributes) {
    memset(attributes, 0, 64);
    return DONE;
}

/* ---- devices ---- */

static __thread int current, chosen;

int aclrtGetDeviceCount(unsigned *count) {
    const char *visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
    *count = atoi(setting("AQUILA_SIMULATED_NPUS", "1"));
    if (visible) {
        unsigned named = *visible != 0;
        for (; *visible; visible++) named += *visible == ',';
        if (named < *count) *count = named;
    }
    return DONE;
}
int aclrtSetDevice(int device) {
    current = device;
    chosen = 1;
    return DONE;
}
int aclrtGetDevice(int *device) {
    *device = current;
    return DONE;
}
int aclrtGetPrimaryCtxState(int device, unsigned *flags, int *active) {
    *active = chosen;
    return DONE;
}
const char *aclrtGetSocName(void) { return setting("AQUILA_SIMULATED_CHIP", "Ascend910B3"); }
const char *aclGetRecentErrMsg(void) { return ""; }
int aclrtGetCurrentContext(void **context) {
    *context = handle;
    return DONE;
}
int aclrtGetSysParamOpt(int option, int64_t *value) {
    *value = 0;
    return DONE;
}
int aclrtGetDeviceInfo(unsigned device, int attribute, int64_t *value) {
    *value = 24;
    return DONE;
}
int aclrtDeviceCanAccessPeer(int *can, int one, int other) {
    *can = 1;
    return DONE;
}
int aclrtGetFunctionAddr(void *function, void **core, void **vector) {
    *core = *vector = 0;
    return DONE;
}
int rtGetC2cCtrlAddr(uint64_t *address, uint32_t *length) {
    *address = *length = 0;
    return DONE;
}

/* ---- streams and events ---- */

int aclrtCreateStream(void **stream) {
    static _Atomic unsigned made;
    *stream = handle + 8 * (made++ % 500);
    return DONE;
}
int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flags) { return aclrtCreateStream(stream); }
int aclrtStreamQuery(void *stream, int *status) {
    *status = 0;
    return DONE;
}
int aclrtStreamGetId(void *stream, int *id) {
    *id = 1;
    return DONE;
}
int aclrtCreateEvent(void **event) {
    *event = malloc(16);
    return DONE;
}
int aclrtCreateEventWithFlag(void **event, unsigned flags) { return aclrtCreateEvent(event); }
int aclrtCreateEventExWithFlag(void **event, unsigned flags) { return aclrtCreateEvent(event); }
int aclrtDestroyEvent(void *event) {
    free(event);
    return DONE;
}
int aclrtQueryEventStatus(void *event, int *status) {
    *status = 1;
    return DONE;
}
int aclrtQueryEventWaitStatus(void *event, int *status) {
    *status = 1;
    return DONE;
}
int aclrtEventElapsedTime(float *milliseconds, void *begin, void *end) {
    *milliseconds = 0;
    return DONE;
}
int aclrtEventGetTimestamp(void *event, uint64_t *timestamp) {
    *timestamp = 0;
    return DONE;
}
