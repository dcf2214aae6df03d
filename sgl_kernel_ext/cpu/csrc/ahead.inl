// What is computed next, asked for in advance.

// Positions [begin, end) of item `item`; item -1: none.
struct Stretch {
  int64_t item = -1;
  int64_t begin = 0;
  int64_t end = 0;
};

// Slots need not follow each other, so the machine cannot guess which lines come next; asking for
// them one by one, at an even pace while a tile is computed, keeps memory busy throughout.
class Ahead {
  static constexpr int64_t LINE = 64;
  static constexpr int64_t WHOLE = 1 << 16;  // `due` and `pace` count lines in parts of this

  struct Lines {
    const char* keys = nullptr;
    const char* values = nullptr;
    int64_t row_bytes = 0;  // of a slot, those that will be read
    const int32_t* slot = nullptr;
    const int32_t* end = nullptr;

    Lines(const BlendAttention& a, const Stretch& s) {
      if (s.item < 0) return;
      const BlendItem& item = a.items[s.item];
      const int64_t head_bytes = a.head_dim * (a.bfloat16 != 0 ? 2 : 4);
      const int64_t first = item.kv_head < 0 ? 0 : item.kv_head * head_bytes;
      keys = static_cast<const char*>(a.key_pool) + first;
      values = static_cast<const char*>(a.value_pool) + first;
      row_bytes = item.kv_head < 0 ? a.kv_heads * head_bytes : head_bytes;
      slot = a.slots + item.table_row * a.slot_stride + s.begin;
      end = slot + (s.end - s.begin);
    }

    int64_t count() const { return (end - slot) * ((row_bytes + LINE - 1) / LINE); }
  };

  Lines now;
  Lines then;
  int64_t slot_bytes;
  int64_t offset = 0;
  int64_t due = 0;
  int64_t pace;

 public:
  // Asks for `first` and `second`, in that order, within so many steps.
  Ahead(const BlendAttention& a, const Stretch& first, const Stretch& second, int64_t steps)
      : now(a, first.item < 0 ? second : first), then(a, first.item < 0 ? first : second),
        slot_bytes(a.kv_heads * a.head_dim * (a.bfloat16 != 0 ? 2 : 4)),
        pace((now.count() + then.count()) * WHOLE / (steps < 1 ? 1 : steps) + 1) {}

  // NOTE: gcc takes a function that only prefetches for one without effect, and drops the calls.
  __attribute__((always_inline)) inline void step() {
    for (due += pace; due >= WHOLE && now.slot < now.end; due -= WHOLE) {
      const int64_t at = *now.slot * slot_bytes + offset;
      __builtin_prefetch(now.keys + at, 0, 2);
      __builtin_prefetch(now.values + at, 0, 2);
      offset += LINE;
      if (offset < now.row_bytes) continue;
      offset = 0;
      if (++now.slot < now.end) continue;
      now = then;
      then.end = then.slot;
    }
  }
};
