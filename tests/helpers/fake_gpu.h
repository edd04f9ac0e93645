/* A GPU driver without a GPU: what tests/fake_cuda.c and tests/fake_hip.c share.
 *
 * Memory is host memory, kernels are the few C functions below, found by their symbol. Kernels of
 * real device code are not computed, but held to what that code says of them (fake_code.h): how many
 * parameters of which size, how many threads, and that every pointer leads into device memory; what
 * one "computes" is what the test wants of it (fake_answer). It is stricter than a driver: work that
 * was queued runs only when something waits for it, launches of a graph run as late as their edges
 * allow, copies want pinned memory, and nothing may be allocated while graphs are being launched.
 * What breaks a rule fails with code 1 and is kept as a complaint.
 */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_code.h"

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 101 };
enum { NO_TIME = 2 }; /* events: CU_EVENT_DISABLE_TIMING, hipEventDisableTiming */
enum { BAD_IMAGE = 200, BAD_CONTEXT = 201, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };
/* How copies to the host go wrong when the test asks for it: fake_corrupt_copies. */
enum { CHANGE_BYTES = 1, LOSE_COPIES = 2 };
#define DEVICES 2
#define MAX_EDGES 16
#define MAX_NODES 256
#define MAX_BLOCK 1024
#define ASKED_SHARED (48 << 10)
#define TEXT (64 << 20)
#define ORDER (1 << 20)

typedef enum { STREAM = 1, EVENT, MODULE, FUNCTION, GRAPH, NODE, EXECUTABLE, DEVICE, PINNED } Kind;
static const char *KIND_NAMES[] = {"",     "stream", "event",      "module",        "function",
                                   "graph", "node",   "executable", "device memory", "pinned memory"};

typedef struct Object Object;
typedef struct {
    Object *from;
    int programmatic;
} Dependency;
struct Object {
    Kind kind;
    int live;
    Object *next, *owner;
    /* memory; `kept` for modules too */
    char *memory;
    size_t size;
    int real;
    /* function */
    const struct Kernel *kernel;
    size_t shared_allowed;
    /* node: threads along x, values of parameters */
    unsigned grid[3], threads, shared;
    uint64_t params[MAX_PARAMS];
    Dependency edges[MAX_EDGES];
    size_t edge_count, index;
    /* graph and executable */
    Object *nodes[MAX_NODES];
    size_t node_count;
    /* event */
    int recorded, reached, timed;
    double time;
};

typedef enum { FILL, TO_DEVICE, TO_HOST, LAUNCH, RECORD } OpKind;
typedef struct {
    OpKind kind;
    void *to;
    const void *from;
    size_t size;
    int byte;
    Object *object, *stream;
} Op;

static Object *objects;
static Op queue[4096];
static size_t queued;
static struct {
    int initialized, launched, sticky, retained, expected_device, corrupt, last_error;
    double clock;
    size_t executables;
    char fail_call[64];
    int fail_at, fail_code, noise;
    char arch[64];
} fake = {.arch = "gfx942:sramecc+:xnack-"};
static char order_text[ORDER], log_text[TEXT], complaint_text[TEXT], outstanding_text[TEXT];
static struct {
    char name[64];
    int count;
} calls[256];
/* START_DEVICE is what is current on a thread that never asked: a device, or -1 for none. */
static __thread int current_device = START_DEVICE;

static void append(char *text, const char *format, ...) {
    static size_t log_used; /* launches are many: their text is not measured again each time */
    size_t used = text != log_text ? strlen(text) : log_text[0] ? log_used : 0;
    va_list args;
    va_start(args, format);
    int more = vsnprintf(text + used, TEXT - used, format, args);
    va_end(args);
    if (used + more >= TEXT) fprintf(stderr, "fake: out of room for text\n"), abort();
    if (text == log_text) log_used = used + more;
}
/* Keep a complaint; its value is the code to return. */
static int complain(int code) {
    append(complaint_text, "\n");
    return code;
}
#define MISUSE(...) (append(complaint_text, __VA_ARGS__), complain(INVALID))

static int is_sticky(int code) { return code == 700 || code == 719; }

static int count_call(const char *name) {
    size_t i = 0;
    while (calls[i].name[0] && strcmp(calls[i].name, name)) i++;
    strcpy(calls[i].name, name);
    size_t used = strlen(order_text);
    if (used + strlen(name) + 2 < ORDER) sprintf(order_text + used, "%s\n", name);
    return ++calls[i].count;
}

/* The start of every function: what it must return instead of doing its work, or OK. */
static int enter(const char *name, int needs_device) {
    int nth = count_call(name);
    if (fake.sticky) return fake.sticky;
    if (!fake.initialized && strcmp(name, "cuInit") && strcmp(name, "hipInit"))
        return (void)MISUSE("%s before init", name), NOT_INITIALIZED;
    if (!strcmp(name, fake.fail_call) && nth == fake.fail_at) {
        if (is_sticky(fake.fail_code)) fake.sticky = fake.fail_code;
        return fake.last_error = fake.fail_code;
    }
    if (needs_device && current_device != fake.expected_device)
        return (void)MISUSE("%s with device %d current", name, current_device), BAD_CONTEXT;
    return OK;
}
#define ENTER(needs_device)                         \
    do {                                            \
        int code_ = enter(__func__, needs_device);  \
        if (code_) return code_;                    \
    } while (0)

static Object *object_of(const void *handle, Kind kind) {
    for (Object *o = objects; o; o = o->next)
        if (o == handle && o->kind == kind && o->live) return o;
    return NULL;
}
#define WANT(var, handle, kind)                                                     \
    Object *var = object_of((const void *)(handle), kind);                          \
    if (!var) return MISUSE("%s: no live %s %p", __func__, KIND_NAMES[kind], (void *)(handle))

static Object *new_object(Kind kind, Object *owner) {
    Object *o = calloc(1, sizeof *o);
    o->kind = kind, o->live = 1, o->owner = owner, o->next = objects;
    return objects = o;
}

static int create(const char *call, Kind kind, Object **out) {
    if (fake.launched) return MISUSE("%s: a %s made after the first launch", call, KIND_NAMES[kind]);
    *out = new_object(kind, NULL);
    return OK;
}

static int create_event(const char *call, int timed, Object **out) {
    int code = create(call, EVENT, out);
    if (!code) (*out)->timed = timed;
    return code;
}

static Object *range_of(const void *start, size_t size, Kind kind) {
    for (Object *o = objects; o; o = o->next)
        if (o->kind == kind && o->live && (char *)start >= o->memory &&
            (char *)start + size <= o->memory + o->size)
            return o;
    return NULL;
}

/* ---- kernels: parameters as 8-byte words; 0, or the code of the fault */

/* `run` is NULL where the code is real and `signature` (its two last parameters left out) holds. */
typedef struct Kernel {
    const char *name;
    int params;
    int sizes[MAX_PARAMS];
    int (*run)(const uint64_t *p);
    Signature signature;
} Kernel;

static float as_float(uint64_t word) {
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}
#define REACHES(pointer, count) range_of(pointer, (count) * sizeof *(pointer), DEVICE)

static int run_add(const uint64_t *p) { /* out, a, b, n */
    float *out = (float *)p[0], *a = (float *)p[1], *b = (float *)p[2];
    int n = (int)p[3];
    if (!REACHES(out, n) || !REACHES(a, n) || !REACHES(b, n)) return ILLEGAL_ADDRESS;
    for (int i = 0; i < n; i++) out[i] = a[i] + b[i];
    return OK;
}
static int run_axpy(const uint64_t *p) { /* y, x, a, n */
    float *y = (float *)p[0], *x = (float *)p[1], a = as_float(p[2]);
    int n = (int)p[3];
    if (!REACHES(y, n) || !REACHES(x, n)) return ILLEGAL_ADDRESS;
    for (int i = 0; i < n; i++) y[i] = a * x[i] + y[i];
    return OK;
}
static int run_copy(const uint64_t *p) { /* to, from, bytes */
    char *to = (char *)p[0], *from = (char *)p[1];
    if (!REACHES(to, p[2]) || !REACHES(from, p[2])) return ILLEGAL_ADDRESS;
    memcpy(to, from, p[2]);
    return OK;
}
static int run_count(const uint64_t *p) { /* state, out */
    int *state = (int *)p[0], *out = (int *)p[1];
    if (!REACHES(state, 1) || !REACHES(out, 1)) return ILLEGAL_ADDRESS;
    *out = ++*state;
    return OK;
}
static int run_noise(const uint64_t *p) { /* out */
    int *out = (int *)p[0];
    if (!REACHES(out, 1)) return ILLEGAL_ADDRESS;
    *out = ++fake.noise;
    return OK;
}
static const Kernel KERNELS[] = {
    {"add", 4, {8, 8, 8, 4}, run_add},      {"axpy", 4, {8, 8, 4, 4}, run_axpy},
    {"copy", 3, {8, 8, 8}, run_copy},       {"count", 2, {8, 8}, run_count},
    {"noise", 1, {8}, run_noise},
};

/* ---- real kernels, which write what the test wants: a word that is one more at each launch */

static struct {
    char kernel[64];
    int param;
    uint32_t word;
} answers[8];

static int run_real(const Object *node) {
    const Kernel *kernel = node->owner->kernel;
    for (int i = 0; i < kernel->params; i++)
        if (kernel->signature.pointers[i] && !range_of((void *)node->params[i], 1, DEVICE))
            return ILLEGAL_ADDRESS;
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++) {
        if (strcmp(answers[i].kernel, kernel->name)) continue;
        uint32_t *to = (uint32_t *)node->params[answers[i].param];
        if (!REACHES(to, node->grid[0])) return ILLEGAL_ADDRESS;
        for (unsigned x = 0; x < node->grid[0]; x++) to[x] = answers[i].word;
        answers[i].word++;
    }
    return OK;
}

/* ---- graphs */

/* `room` is how many bytes there are from a pointer to the end of its memory, 0 for numbers. */
static int run_node(const Object *node, const Object *exec) {
    const Kernel *kernel = node->owner->kernel;
    append(log_text, "{\"kernel\":\"%s\",\"graph\":%zu,\"node\":%zu,\"grid\":[%u,%u,%u],",
           kernel->name, exec->index, node->index, node->grid[0], node->grid[1], node->grid[2]);
    append(log_text, "\"threads\":%u,\"shared\":%u,\"params\":[", node->threads, node->shared);
    for (int i = 0; i < kernel->params; i++)
        append(log_text, "%s%llu", i ? "," : "", (unsigned long long)node->params[i]);
    append(log_text, "],\"room\":[");
    for (int i = 0; i < kernel->params; i++) {
        char *at = (char *)node->params[i];
        Object *o = kernel->sizes[i] == 8 ? range_of(at, 1, DEVICE) : NULL;
        append(log_text, "%s%zu", i ? "," : "", o ? (size_t)(o->memory + o->size - at) : 0);
    }
    append(log_text, "],\"after\":[");
    for (size_t i = 0; i < node->edge_count; i++)
        append(log_text, "%s[%zu,%d]", i ? "," : "", node->edges[i].from->index,
               node->edges[i].programmatic);
    append(log_text, "]}\n");
    return kernel->run ? kernel->run(node->params) : run_real(node);
}

/* Of the nodes whose predecessors have run, always the one that was added last. */
static int run_graph(const Object *exec) {
    char done[MAX_NODES] = {0};
    for (size_t left = exec->node_count; left; left--) {
        size_t at = exec->node_count;
        while (at--) {
            int ready = !done[at];
            for (size_t e = 0; e < exec->nodes[at]->edge_count; e++)
                ready &= done[exec->nodes[at]->edges[e].from->index];
            if (ready) break;
        }
        done[at] = 1;
        int code = run_node(exec->nodes[at], exec);
        if (code) return code;
    }
    return OK;
}

typedef struct {
    const void *function;
    unsigned grid[3], block[3], shared;
    void **params, **extra;
} NodeParams;

/* What real code asks of its launches; OK for a kernel of the test's. */
static int check_signature(const char *call, const Kernel *kernel, NodeParams p) {
    const Signature *s = &kernel->signature;
    if (kernel->run) return OK;
    if (s->at_most ? p.block[0] > s->threads : p.block[0] != s->threads)
        return MISUSE("%s: %u threads for %s, which was built for %u", call, p.block[0], kernel->name,
                      s->threads);
    for (int i = 0; i < kernel->params; i++) {
        if (!s->pointers[i]) continue;
        void *at = *(void **)p.params[i];
        if (!range_of(at, 1, DEVICE))
            return MISUSE("%s: parameter %d of %s is %p, where no device memory is", call, i,
                          kernel->name, at);
    }
    return OK;
}

static int add_node(const char *call, const void *graph_handle, const void *const *before,
                    const unsigned char *programmatic, size_t count, NodeParams p, Object **out) {
    Object *graph = object_of(graph_handle, GRAPH), *function = object_of(p.function, FUNCTION);
    if (fake.launched) return MISUSE("%s after the first launch", call);
    if (!graph) return MISUSE("%s: no live graph", call);
    if (!function) return MISUSE("%s: no live function", call);
    if (!p.params || p.extra) return MISUSE("%s: expected kernelParams and no extra", call);
    if (count > MAX_EDGES || (count && !before)) return MISUSE("%s: %zu edges", call, count);
    if (!p.grid[0] || !p.grid[1] || !p.grid[2] || p.grid[1] > 65535 || p.grid[2] > 65535)
        return MISUSE("%s: grid %u %u %u", call, p.grid[0], p.grid[1], p.grid[2]);
    if (!p.block[0] || p.block[1] != 1 || p.block[2] != 1 || p.block[0] > MAX_BLOCK)
        return MISUSE("%s: block %u %u %u", call, p.block[0], p.block[1], p.block[2]);
    if ((uint64_t)p.grid[0] * p.block[0] >> 32) return MISUSE("%s: too many threads", call);
    const Kernel *kernel = function->kernel;
    if (p.shared + kernel->signature.shared > function->shared_allowed)
        return MISUSE("%s: %u bytes of shared memory, allowed %zu", call,
                      p.shared + kernel->signature.shared, function->shared_allowed);
    if (graph->node_count == MAX_NODES) return MISUSE("%s: more than %d nodes", call, MAX_NODES);
    int code = check_signature(call, kernel, p);
    if (code) return code;
    Object *node = new_object(NODE, function);
    for (size_t i = 0; i < count; i++) {
        Object *from = object_of(before[i], NODE);
        int inside = 0;
        for (size_t j = 0; j < graph->node_count; j++) inside |= graph->nodes[j] == from;
        for (size_t j = 0; j < i; j++)
            if (before[j] == before[i]) return MISUSE("%s: an edge twice", call);
        if (!from || !inside) return MISUSE("%s: edge %zu from no node of this graph", call, i);
        node->edges[i] = (Dependency){from, programmatic && programmatic[i]};
    }
    for (int i = 0; i < kernel->params; i++) memcpy(&node->params[i], p.params[i], kernel->sizes[i]);
    for (int i = 0; i < 2; i++)
        if (*(void **)p.params[kernel->params + i])
            return MISUSE("%s: parameter %d of %s is not null", call, kernel->params + i, kernel->name);
    memcpy(node->grid, p.grid, sizeof p.grid);
    node->threads = p.block[0], node->shared = p.shared, node->edge_count = count;
    node->index = graph->node_count;
    graph->nodes[graph->node_count++] = node;
    *out = node;
    return OK;
}

static int instantiate(const char *call, const void *handle, Object **out) {
    Object *graph = object_of(handle, GRAPH);
    if (!graph) return MISUSE("%s: no live graph", call);
    int code = create(call, EXECUTABLE, out);
    if (code) return code;
    memcpy((*out)->nodes, graph->nodes, sizeof graph->nodes);
    (*out)->node_count = graph->node_count, (*out)->index = fake.executables++;
    return OK;
}

/* ---- streams */

static int enqueue(const char *call, const void *stream, Op op) {
    op.stream = object_of(stream, STREAM);
    if (!op.stream) return MISUSE("%s: no live stream", call);
    if (queued == sizeof queue / sizeof *queue) return MISUSE("%s: the queue is full", call);
    queue[queued++] = op;
    return OK;
}

static int copy_op(const char *call, OpKind kind, void *to, const void *from, size_t n, void *stream) {
    const void *device = kind == TO_HOST ? from : to, *host = kind == TO_HOST ? to : from;
    if (!n) return MISUSE("%s: nothing to copy", call);
    if (!range_of(device, n, DEVICE)) return MISUSE("%s: outside of device memory", call);
    if (!range_of(host, n, PINNED)) return MISUSE("%s: outside of pinned memory", call);
    return enqueue(call, stream, (Op){.kind = kind, .to = to, .from = from, .size = n});
}

static int fill_op(const char *call, void *to, int byte, size_t n, void *stream) {
    if (!n || !range_of(to, n, DEVICE)) return MISUSE("%s: outside of device memory", call);
    return enqueue(call, stream, (Op){.kind = FILL, .to = to, .byte = byte, .size = n});
}

static int launch_op(const char *call, const void *handle, void *stream) {
    Object *exec = object_of(handle, EXECUTABLE);
    if (!exec) return MISUSE("%s: no live executable graph", call);
    fake.launched = 1;
    return enqueue(call, stream, (Op){.kind = LAUNCH, .object = exec});
}

/* Run what is queued, up to `end`. */
static int drain_some(size_t end) {
    for (size_t i = 0; i < end; i++) {
        Op *op = &queue[i];
        int code = OK;
        if (op->kind == FILL) memset(op->to, op->byte, op->size);
        int lost = op->kind == TO_HOST && fake.corrupt == LOSE_COPIES;
        if ((op->kind == TO_DEVICE || op->kind == TO_HOST) && !lost)
            memcpy(op->to, op->from, op->size);
        if (op->kind == TO_HOST && fake.corrupt == CHANGE_BYTES) *(char *)op->to ^= 1;
        if (op->kind == LAUNCH) fake.clock += 0.25, code = run_graph(op->object);
        if (op->kind == RECORD) op->object->reached = 1, op->object->time = fake.clock;
        if (code) return queued = 0, fake.sticky = code;
    }
    memmove(queue, queue + end, (queued -= end) * sizeof *queue);
    return OK;
}
static int drain(void) { return drain_some(queued); }
/* A wait for an event runs nothing behind it. */
static int drain_to(const Object *event) {
    size_t end = queued;
    while (end && (queue[end - 1].kind != RECORD || queue[end - 1].object != event)) end--;
    return drain_some(end);
}

static int record_op(const char *call, const void *handle, void *stream) {
    Object *event = object_of(handle, EVENT);
    if (!event) return MISUSE("%s: no live event", call);
    event->recorded = 1, event->reached = 0;
    return enqueue(call, stream, (Op){.kind = RECORD, .object = event});
}

static int elapsed(const char *call, float *ms, const void *a, const void *b) {
    Object *start = object_of(a, EVENT), *end = object_of(b, EVENT);
    if (!start || !end || !start->timed || !end->timed || !start->reached || !end->reached)
        return MISUSE("%s: an event without a time, or not reached", call);
    *ms = (float)(end->time - start->time);
    return OK;
}

/* ---- memory, modules, and the end of objects */

static int allocate(const char *call, Kind kind, size_t size, void **out) {
    Object *o;
    if (!size) return MISUSE("%s: 0 bytes", call);
    int code = create(call, kind, &o);
    if (code) return code;
    /* Device memory starts as garbage, so that what relies on zeros is seen. */
    o->memory = aligned_alloc(256, (size + 255) / 256 * 256), o->size = size;
    memset(o->memory, 0xA5, size);
    *out = o->memory;
    return OK;
}

static int end_object(const char *call, const void *handle, Kind kind) {
    Object *o = object_of(handle, kind);
    if (!o) return MISUSE("%s: no live %s", call, KIND_NAMES[kind]);
    if (queued) return MISUSE("%s: work is still queued", call);
    if (kind == MODULE)
        for (Object *f = objects; f; f = f->next)
            if (f->owner == o) f->live = 0;
    o->live = 0;
    int executables = 0;
    for (Object *e = objects; e; e = e->next) executables += e->live && e->kind == EXECUTABLE;
    fake.launched &= executables > 0;
    return OK;
}

static int free_memory(const char *call, const void *address, Kind kind) {
    for (Object *o = objects; o; o = o->next)
        if (o->kind == kind && o->live && o->memory == address) {
            if (queued) return MISUSE("%s: work is still queued", call);
            memset(o->memory, 0xEE, o->size);
            o->live = 0;
            return OK;
        }
    return MISUSE("%s: no live %s at %p", call, KIND_NAMES[kind], (void *)address);
}

/* Real code, or one of the test's images: an ELF header of 64 bytes, then the names of its kernels
 * as one C string. */
static int load_module(const char *call, const void *image, int machine, Object **out) {
    uint16_t found;
    memcpy(&found, (const char *)image + 18, sizeof found);
    if (memcmp(image, "\x7f" "ELF", 4) || found != machine) return BAD_IMAGE;
    int code = create(call, MODULE, out);
    if (code) return code;
    (*out)->real = ((const Elf64_Ehdr *)image)->e_shnum > 0;
    size_t size = (*out)->real ? code_bytes(image) : 65 + strlen((const char *)image + 64);
    (*out)->memory = memcpy(malloc(size), image, size);
    return OK;
}

static int make_function(Object *module, const Kernel *kernel, Object **out) {
    /* A module has each function once: what is allowed of it is so for all who ask for it. */
    for (*out = objects; *out; *out = (*out)->next)
        if ((*out)->kind == FUNCTION && (*out)->owner == module && (*out)->live
            && !strcmp((*out)->kernel->name, kernel->name)) return OK;
    *out = new_object(FUNCTION, module);
    (*out)->kernel = kernel, (*out)->shared_allowed = ASKED_SHARED;
    return OK;
}
static int real_function(const char *call, Object *module, const char *name, Object **out) {
    if (!symbol(module->memory, name, STT_FUNC)) return NOT_FOUND;
    Kernel *kernel = calloc(1, sizeof *kernel);
    const char *wrong = read_signature(module->memory, name, &kernel->signature);
    if (wrong) return MISUSE("%s: kernel %s %s", call, name, wrong);
    kernel->name = strdup(name), kernel->params = kernel->signature.params - 2;
    memcpy(kernel->sizes, kernel->signature.sizes, sizeof kernel->sizes);
    return make_function(module, kernel, out);
}

static int get_function(const char *call, const void *handle, const char *name, Object **out) {
    Object *module = object_of(handle, MODULE);
    if (!module) return MISUSE("%s: no live module", call);
    if (module->real) return real_function(call, module, name, out);
    if (!strstr(module->memory + 64, name)) return NOT_FOUND;
    for (size_t i = 0; i < sizeof KERNELS / sizeof *KERNELS; i++)
        if (!strcmp(KERNELS[i].name, name)) return make_function(module, &KERNELS[i], out);
    return NOT_FOUND;
}

/* ---- for the test */

void fake_reset(const char *arch, int expected_device);
void fake_fail(const char *call, int from_now, int code);
void fake_corrupt_copies(int how);
void fake_answer(const char *kernel, int param, uint32_t word);
int fake_current_device(void);
int fake_last_error(void);
int fake_calls(const char *name);
const char *fake_log(void);
const char *fake_order(void);
void fake_clear_order(void);
void fake_clear_log(void);
const char *fake_complaints(void);
const char *fake_outstanding(void);

void fake_reset(const char *arch, int expected_device) {
    memset(&fake, 0, sizeof fake), memset(calls, 0, sizeof calls);
    memset(answers, 0, sizeof answers);
    for (Object *o = objects; o; o = o->next) o->live = 0;
    queued = 0, current_device = START_DEVICE;
    log_text[0] = complaint_text[0] = order_text[0] = 0;
    snprintf(fake.arch, sizeof fake.arch, "%s", arch);
    fake.expected_device = expected_device;
}
void fake_fail(const char *call, int from_now, int code) {
    size_t i = 0;
    while (calls[i].name[0] && strcmp(calls[i].name, call)) i++;
    snprintf(fake.fail_call, sizeof fake.fail_call, "%s", call);
    fake.fail_at = calls[i].count + from_now, fake.fail_code = code;
}
void fake_corrupt_copies(int how) { fake.corrupt = how; }
/* From now on the real kernel writes `word`, then one more at each launch, as many as its grid is
 * wide, where its parameter points to. */
void fake_answer(const char *kernel, int param, uint32_t word) {
    size_t i = 0;
    while (answers[i].kernel[0]) i++;
    snprintf(answers[i].kernel, sizeof answers[i].kernel, "%s", kernel);
    answers[i].param = param, answers[i].word = word;
}
int fake_current_device(void) { return current_device; }
/* What a failure that the test asked for left for whoever asks (HIP only). */
int fake_last_error(void) { return fake.last_error; }
int fake_calls(const char *name) {
    size_t i = 0;
    while (calls[i].name[0] && strcmp(calls[i].name, name)) i++;
    return calls[i].count;
}
const char *fake_log(void) { return log_text; }
void fake_clear_log(void) { log_text[0] = 0; }
/* The names of all functions that were called, in their order. */
const char *fake_order(void) { return order_text; }
void fake_clear_order(void) { order_text[0] = 0; }
const char *fake_complaints(void) { return complaint_text; }
/* One line for each object that was made and is still there. */
const char *fake_outstanding(void) {
    outstanding_text[0] = 0;
    for (Object *o = objects; o; o = o->next)
        if (o->live && o->kind != FUNCTION && o->kind != NODE)
            append(outstanding_text, "%s %zu\n", KIND_NAMES[o->kind], o->size);
    if (fake.retained) append(outstanding_text, "contexts %d\n", fake.retained);
    return outstanding_text;
}
