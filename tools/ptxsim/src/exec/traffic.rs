//! What an access costs: sectors of global memory, passes over the banks of shared memory.

use super::lane::{FULL, LANES, Row, lanes};

/// Sectors of 32 bytes that a request touches, each pass of the warp (128 bytes at most) on its own.
#[inline(always)]
pub(crate) fn count_sectors(addresses: &Row<u64>, active: u32, size: u32) -> u32 {
    let per_pass = (128 / size).min(32) as usize;
    // Where addresses rise from lane to lane, each change begins a sector.
    let (mut begun, mut fallen) = (1, 0);
    for l in 1..LANES {
        let (sector, before) = (addresses[l] / 32, addresses[l - 1] / 32);
        let anew = l % per_pass == 0;
        begun += u32::from(anew | (sector != before));
        fallen |= u32::from(!anew & (sector < before));
    }
    if active == FULL && fallen == 0 { begun } else { distinct_sectors(addresses, active, per_pass) }
}

#[inline(never)]
fn distinct_sectors(addresses: &Row<u64>, active: u32, per_pass: usize) -> u32 {
    let mut total = 0;
    for first in (0..LANES).step_by(per_pass) {
        let mut seen = [u64::MAX; LANES];
        let mut n = 0;
        for l in first..first + per_pass {
            let sector = addresses[l] / 32;
            if active >> l & 1 != 0 && !seen[..n].iter().rev().any(|s| *s == sector) {
                seen[n] = sector;
                n += 1;
            }
        }
        total += n as u32;
    }
    total
}

/// Passes over the 32 banks that an access takes, and the fewest that so many bytes could take.
///
/// Accesses of 8 bytes go by half warps, of 16 bytes by quarters. Lanes that want the same word share it.
#[inline(always)]
pub(crate) fn count_wavefronts(addresses: &Row<u32>, active: u32, size: u32) -> (u32, u32) {
    if size == 4 && active == FULL && without_conflict(addresses) {
        return (1, 1);
    }
    count_conflicts(addresses, active, size)
}

/// Whether words of all lanes are one pass: in so many banks, or so near each other that no two share a bank.
#[inline(always)]
fn without_conflict(addresses: &Row<u32>) -> bool {
    let (mut banks, mut low, mut high) = (0, u32::MAX, 0);
    for address in addresses {
        banks |= 1u32 << (address / 4 % 32);
        low = low.min(address / 4);
        high = high.max(address / 4);
    }
    let aligned = addresses.iter().fold(0, |all, a| all | a) % 4 == 0;
    aligned && (banks == FULL || high - low < 32)
}

#[inline(never)]
fn count_conflicts(addresses: &Row<u32>, active: u32, size: u32) -> (u32, u32) {
    let per_pass = (128 / size).min(32) as usize;
    let (mut wavefronts, mut ideal) = (0, 0);
    for first in (0..LANES).step_by(per_pass) {
        let here = active >> first & ((1u64 << per_pass) - 1) as u32;
        ideal += u32::from(here != 0);
        // A misaligned access touches a word more.
        let mut words = [0; 2 * LANES];
        let mut n = 0;
        for l in lanes(here) {
            let address = addresses[first + l];
            for word in address / 4..=address.wrapping_add(size - 1) / 4 {
                words[n] = word;
                n += 1;
            }
        }
        wavefronts += count_passes(&mut words[..n]);
    }
    (wavefronts, ideal)
}

/// Passes until all words were served, when each pass serves one word of each bank.
fn count_passes(mut words: &mut [u32]) -> u32 {
    let mut passes = 0;
    while !words.is_empty() {
        let (mut served, mut taken, mut left) = ([0; 32], 0u32, 0);
        for n in 0..words.len() {
            let (word, bank) = (words[n], words[n] as usize % 32);
            if taken >> bank & 1 == 0 {
                taken |= 1 << bank;
                served[bank] = word;
            } else if served[bank] != word {
                words[left] = word;
                left += 1;
            }
        }
        words = &mut words[..left];
        passes += 1;
    }
    passes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Addresses by lane, as kernels have them and not.
    const PATTERNS: [fn(u32, u32) -> u32; 8] = [
        |lane, size| lane * size,
        |lane, size| 4096 - lane * size,
        |lane, _| lane / 4 * 4,
        |lane, _| lane / 4 * 144 + lane % 4 * 4,
        |lane, _| lane / 8 * 1024 + lane % 8 * 16,
        |lane, _| lane % 2 * 128,
        |lane, _| lane * 4 + 2,
        |_, _| 64,
    ];

    #[test]
    fn short_ways_count_what_long_ones_do() {
        for pattern in PATTERNS {
            for size in [1, 2, 4, 8, 16] {
                for active in [FULL, 0x0f0f_00ff, 0] {
                    let narrow: Row<u32> = std::array::from_fn(|lane| pattern(lane as u32, size));
                    let wide = narrow.map(u64::from);
                    let sectors = distinct_sectors(&wide, active, (128 / size).min(32) as usize);
                    assert_eq!(count_sectors(&wide, active, size), sectors, "{narrow:?} {size}");
                    let passes = count_conflicts(&narrow, active, size);
                    assert_eq!(count_wavefronts(&narrow, active, size), passes, "{narrow:?} {size}");
                }
            }
        }
    }
}
