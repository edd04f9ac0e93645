/* What a cubin or hsaco says of its kernels, read as a driver reads it: for tests/fake_gpu.h.
 *
 * AMD: the kernel's descriptor (64 bytes, symbol NAME.kd) and the note NT_AMDGPU_METADATA, which is
 * msgpack (LLVM, "User Guide for AMDGPU Backend", code object V5). NVIDIA: the section
 * .nv.info.NAME, attributes of which cuobjdump shows the meaning.
 */
#include <elf.h>

#define MAX_PARAMS 40
enum { EM_NVIDIA = 190, EM_AMD = 224, NOTE_AMD_METADATA = 32 };
enum { INFO_REQUIRED_THREADS = 0x10, INFO_PARAM = 0x17, INFO_PARAM_BYTES = 0x19 };
enum { INFO_NO_VALUE = 1, INFO_BYTE = 2, INFO_SHORT = 3, INFO_SIZED = 4 };

/* Parameters as the kernel takes them; `threads` it must be launched with (`at_most`: or fewer),
 * `shared` bytes it has of its own. `pointers[i]` says that parameter i is one. */
typedef struct {
    int params, sizes[MAX_PARAMS], pointers[MAX_PARAMS];
    unsigned threads, at_most, shared;
} Signature;

typedef const unsigned char *Bytes;

static const Elf64_Shdr *section(const void *code, int i) {
    const Elf64_Ehdr *elf = code;
    return (const Elf64_Shdr *)((Bytes)code + elf->e_shoff + (size_t)i * elf->e_shentsize);
}
static const char *section_name(const void *code, int i) {
    const Elf64_Ehdr *elf = code;
    return (const char *)code + section(code, elf->e_shstrndx)->sh_offset + section(code, i)->sh_name;
}
static size_t code_bytes(const void *code) {
    const Elf64_Ehdr *elf = code;
    size_t end = elf->e_shoff + (size_t)elf->e_shnum * elf->e_shentsize;
    size_t programs = elf->e_phoff + (size_t)elf->e_phnum * elf->e_phentsize;
    if (programs > end) end = programs;
    for (int i = 0; i < elf->e_shnum; i++) {
        const Elf64_Shdr *s = section(code, i);
        if (s->sh_type != SHT_NOBITS && s->sh_offset + s->sh_size > end) end = s->sh_offset + s->sh_size;
    }
    return end;
}

/* Where what the symbol stands for begins, or NULL: a global one of that type that is defined. */
static Bytes symbol(const void *code, const char *name, int type) {
    const Elf64_Ehdr *elf = code;
    for (int i = 0; i < elf->e_shnum; i++) {
        const Elf64_Shdr *table = section(code, i);
        if (table->sh_type != SHT_SYMTAB) continue;
        const char *names = (const char *)code + section(code, table->sh_link)->sh_offset;
        const Elf64_Sym *symbols = (const Elf64_Sym *)((Bytes)code + table->sh_offset);
        for (size_t j = 0; j < table->sh_size / sizeof *symbols; j++) {
            const Elf64_Sym *s = &symbols[j];
            if (ELF64_ST_TYPE(s->st_info) != type || ELF64_ST_BIND(s->st_info) != STB_GLOBAL ||
                s->st_shndx == SHN_UNDEF || strcmp(names + s->st_name, name))
                continue;
            const Elf64_Shdr *home = section(code, s->st_shndx);
            return (Bytes)code + home->sh_offset + (s->st_value - home->sh_addr);
        }
    }
    return NULL;
}

/* ---- msgpack */

static uint64_t big_endian(Bytes p, int bytes) {
    uint64_t value = 0;
    while (bytes--) value = value << 8 | *p++;
    return value;
}
/* A value's head: 'm'ap of n pairs, 'a'rray of n, 's'tring of n bytes, 'i'nteger n, or '?'. */
static Bytes value_head(Bytes p, char *kind, uint64_t *n) {
    unsigned b = *p++;
    int bytes = 0;
    if (b < 0x80) return *kind = 'i', *n = b, p;
    if (b < 0x90) return *kind = 'm', *n = b & 15, p;
    if (b < 0xA0) return *kind = 'a', *n = b & 15, p;
    if (b < 0xC0) return *kind = 's', *n = b & 31, p;
    if (b == 0xC2 || b == 0xC3) return *kind = 'i', *n = b & 1, p;
    if (b >= 0xCC && b <= 0xCF) *kind = 'i', bytes = 1 << (b - 0xCC);
    else if (b >= 0xD9 && b <= 0xDB) *kind = 's', bytes = 1 << (b - 0xD9);
    else if (b == 0xDC || b == 0xDD) *kind = 'a', bytes = b == 0xDC ? 2 : 4;
    else if (b == 0xDE || b == 0xDF) *kind = 'm', bytes = b == 0xDE ? 2 : 4;
    else return *kind = '?', *n = 0, p;
    *n = big_endian(p, bytes);
    return p + bytes;
}
static Bytes after_value(Bytes p) {
    char kind;
    uint64_t n;
    p = value_head(p, &kind, &n);
    if (kind == 's') return p + n;
    if (kind == 'm') n *= 2;
    if (kind == 'm' || kind == 'a')
        while (n--) p = after_value(p);
    return p;
}
static int is_text(Bytes p, const char *text) {
    char kind = '?';
    uint64_t n = 0;
    if (p) p = value_head(p, &kind, &n);
    return kind == 's' && n == strlen(text) && !memcmp(p, text, n);
}
static Bytes of_map(Bytes map, const char *key) {
    char kind;
    uint64_t n;
    Bytes p = map ? value_head(map, &kind, &n) : NULL;
    if (!p || kind != 'm') return NULL;
    for (; n; n--, p = after_value(after_value(p)))
        if (is_text(p, key)) return after_value(p);
    return NULL;
}
static int64_t number_of(Bytes map, const char *key) {
    char kind;
    uint64_t n;
    Bytes p = of_map(map, key);
    if (!p) return -1;
    value_head(p, &kind, &n);
    return kind == 'i' ? (int64_t)n : -1;
}

/* ---- the two vendors: NULL, or what is wrong */

static Bytes amd_metadata(const void *code) {
    for (int i = 0; i < ((const Elf64_Ehdr *)code)->e_shnum; i++) {
        if (section(code, i)->sh_type != SHT_NOTE) continue;
        const Elf64_Nhdr *note = (const Elf64_Nhdr *)((Bytes)code + section(code, i)->sh_offset);
        const char *owner = (const char *)(note + 1);
        if (note->n_type == NOTE_AMD_METADATA && !strcmp(owner, "AMDGPU"))
            return (Bytes)owner + (note->n_namesz + 3) / 4 * 4;
    }
    return NULL;
}

static const char *amd_signature(const void *code, const char *name, Signature *out) {
    char descriptor_name[256], kind;
    uint64_t n;
    snprintf(descriptor_name, sizeof descriptor_name, "%s.kd", name);
    Bytes descriptor = symbol(code, descriptor_name, STT_OBJECT);
    if (!descriptor) return "has no descriptor";
    Bytes kernel = of_map(amd_metadata(code), "amdhsa.kernels");
    if (!kernel) return "has no metadata";
    for (kernel = value_head(kernel, &kind, &n); n && !is_text(of_map(kernel, ".name"), name); n--)
        kernel = after_value(kernel);
    if (!n) return "is not in the metadata";
    Bytes arg = of_map(kernel, ".args");
    if (!arg) return "has no arguments";
    int64_t end = 0, behind = 0;
    for (arg = value_head(arg, &kind, &n); n; n--, arg = after_value(arg)) {
        int64_t size = number_of(arg, ".size");
        int pointer = is_text(of_map(arg, ".value_kind"), "global_buffer");
        if (!pointer && !is_text(of_map(arg, ".value_kind"), "by_value")) {
            behind = number_of(arg, ".offset") + size; /* hidden ones, which the runtime fills in */
            continue;
        }
        if (behind) return "has an argument behind hidden ones";
        if (out->params == MAX_PARAMS || size < 1 || size > 8) return "has arguments of other kinds";
        /* Where HIP puts it is where it lies when each has its natural alignment. */
        end = (end + size - 1) / size * size;
        if (number_of(arg, ".offset") != end) return "has an argument at an odd place";
        end += size;
        out->pointers[out->params] = pointer;
        out->sizes[out->params++] = (int)size;
    }
    /* struct kernel_descriptor_t: bytes of LDS, of scratch, of arguments. */
    uint32_t described[3];
    memcpy(described, descriptor, sizeof described);
    if (described[2] != number_of(kernel, ".kernarg_segment_size") ||
        (behind ? described[2] < behind : described[2] != (end + 7) / 8 * 8))
        return "has arguments of another size than its descriptor";
    if (described[0] != number_of(kernel, ".group_segment_fixed_size"))
        return "has other LDS than its descriptor";
    out->shared = described[0], out->at_most = 1;
    out->threads = (unsigned)number_of(kernel, ".max_flat_workgroup_size");
    return NULL;
}

static const char *nvidia_signature(const void *code, const char *name, Signature *out) {
    char info_name[256];
    snprintf(info_name, sizeof info_name, ".nv.info.%s", name);
    if (!symbol(code, name, STT_FUNC)) return "is no function";
    int i = ((const Elf64_Ehdr *)code)->e_shnum;
    while (i-- && strcmp(section_name(code, i), info_name)) {}
    if (i < 0) return "has no information";
    Bytes p = (Bytes)code + section(code, i)->sh_offset, end = p + section(code, i)->sh_size;
    uint32_t declared = 0, bytes = 0;
    while (p < end) {
        uint16_t value;
        uint32_t words[3];
        int format = p[0], attribute = p[1];
        memcpy(&value, p + 2, sizeof value);
        p += 4;
        if (format < INFO_NO_VALUE || format > INFO_SIZED) return "has information of another form";
        if (format == INFO_SHORT && attribute == INFO_PARAM_BYTES) declared = value;
        if (format != INFO_SIZED) continue;
        memcpy(words, p, value < sizeof words ? value : sizeof words);
        p += value;
        if (attribute == INFO_REQUIRED_THREADS) out->threads = words[0] * words[1] * words[2];
        if (attribute != INFO_PARAM) continue;
        /* index in the constant bank; ordinal and offset; size from bit 18 on. Of 8 bytes there are
         * only pointers in what is tested. */
        uint32_t ordinal = words[1] & 0xFFFF, offset = words[1] >> 16, size = words[2] >> 18;
        if (ordinal >= MAX_PARAMS || size < 1 || size > 8) return "has parameters of other kinds";
        out->sizes[ordinal] = (int)size, out->pointers[ordinal] = size == 8;
        if ((int)ordinal >= out->params) out->params = (int)ordinal + 1;
        if (offset + size > bytes) bytes = offset + size;
    }
    if (declared != bytes) return "has parameters of another size than it says";
    uint32_t laid = 0;
    for (int j = 0; j < out->params; j++) {
        if (!out->sizes[j]) return "lacks a parameter";
        laid = (laid + out->sizes[j] - 1) / out->sizes[j] * out->sizes[j] + out->sizes[j];
    }
    return laid == bytes ? NULL : "has a parameter at an odd place";
}

/* Read what `code` says of its kernel `name`. Triton's last two parameters are its scratch. */
static const char *read_signature(const void *code, const char *name, Signature *out) {
    memset(out, 0, sizeof *out);
    int amd = ((const Elf64_Ehdr *)code)->e_machine == EM_AMD;
    const char *wrong = (amd ? amd_signature : nvidia_signature)(code, name, out);
    if (wrong) return wrong;
    if (out->params < 2 || out->sizes[out->params - 1] != 8 || out->sizes[out->params - 2] != 8)
        return "does not end with two pointers";
    if (!out->threads) return "does not say its threads";
    return NULL;
}
