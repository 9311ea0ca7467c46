//! The tables of the programs that switch, besides those of [`shared`](crate::shared). The plugin pins each under its name, so
//! that they outlive the process that made them. See [`bpf_bridge_common::layout`].

use aya_ebpf::{
    btf_maps::{HashMap, LruHashMap, ProgramArray},
    macros::btf_map,
};
use bpf_bridge_common::layout::{
    Learned, LearnedPlace, MAX_LEARNED, MAX_MEMBERS, MAX_PORTS, MacKey, Member, MemberKey,
    PROGRAM_COUNT, PlaceKey,
};

use crate::shared::ON_DEMAND;

#[btf_map]
pub(crate) static LEARNED: LruHashMap<MacKey, Learned, { MAX_LEARNED as usize }> =
    LruHashMap::new();

#[btf_map]
pub(crate) static LEARNED_PLACES: LruHashMap<PlaceKey, LearnedPlace, { MAX_LEARNED as usize }> =
    LruHashMap::new();

#[btf_map]
pub(crate) static MEMBERS: HashMap<MemberKey, Member, { MAX_PORTS as usize }, ON_DEMAND> =
    HashMap::new();

#[btf_map]
pub(crate) static PROGRAMS: ProgramArray<{ PROGRAM_COUNT as usize }> = ProgramArray::new();

const _: () = assert!(MAX_MEMBERS <= MAX_PORTS);
