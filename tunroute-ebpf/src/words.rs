//! The words that prefixes are looked up in.

use core::{arch::asm, ptr};

use aya_ebpf::{Global, helpers::generated::bpf_map_lookup_elem, macros::map, maps::Array};
use tunroute_common::{index::header::NOTHING, trie::Words};

/// Made and pinned by the daemon before it loads the programs, as a map of another type: an array of one map, whose one
/// element is the words.
#[map]
static INDEX: Array<u32> = Array::pinned(1, 0);

/// Number of words of the element. The daemon sets it; the verifier treats it as a constant.
#[unsafe(no_mangle)]
static WORD_COUNT: Global<u64> = Global::new(0);

/// The words as they are for one lookup: publishing others in its course does not change them.
#[derive(Clone, Copy)]
pub struct MapWords {
    words: *const u64,
    count: u64,
}

impl MapWords {
    /// Those that are published.
    #[inline(always)]
    pub fn current() -> Option<Self> {
        let first = 0u32;
        let key = ptr::from_ref(&first).cast_mut().cast();
        // SAFETY: an array of maps takes a number and gives a map or null. A map stays as long as a program that has
        // looked it up runs.
        let map = unsafe { bpf_map_lookup_elem(ptr::from_ref(&INDEX).cast_mut().cast(), key) };
        if map.is_null() {
            return None;
        }
        // SAFETY: as above; the map's element is as large as `WORD_COUNT` says.
        let words = unsafe { bpf_map_lookup_elem(map, key) };
        if words.is_null() {
            return None;
        }
        Some(Self { words: words.cast(), count: WORD_COUNT.load() })
    }
}

impl Words for MapWords {
    #[allow(clippy::cast_possible_truncation, reason = "a register has 64 bits")]
    #[inline(always)]
    fn word(&self, index: u64) -> u64 {
        let mut index = index;
        // SAFETY: reads and writes no memory. The compiler might compare one copy of a number and use another, of which the
        // verifier of Linux 6.1 knows nothing then.
        unsafe {
            asm!(
                "if {index} < {count} goto +1",
                "{index} = {nothing}",
                index = inout(reg) index,
                count = in(reg) self.count,
                nothing = const NOTHING,
                options(pure, nomem, nostack),
            );
        }
        // SAFETY: within the element. Words are written whole.
        unsafe { ptr::read_volatile(self.words.add(index as usize)) }
    }
}
