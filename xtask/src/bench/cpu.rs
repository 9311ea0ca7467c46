//! What a CPU does with its time, by the kernel's account of it.

use std::fs;

use anyhow::{Context as _, Result};

use super::measurement::Cpu;

/// What one must know to read the shares.
pub(super) const NOTE: &str = "CPU times are those of the CPU on which both ends run, from \
     /proc/stat: the shares of its ticks, summed over all turns of a contender, of the time that \
     a transaction, a packet, a connection, a request or a megabyte takes. They are of both ends \
     and of all that is between them, warm-up and the start of generators included; hard \
     interrupts count as system time. What else runs on that CPU is in them: nothing should.";

/// The columns of a CPU in /proc/stat that are parts of its time; the guests' are in
/// `user` and `nice` already.
const COLUMNS: usize = 8;
const USER: usize = 0;
const NICE: usize = 1;
const SYSTEM: usize = 2;
const IRQ: usize = 5;
const SOFTIRQ: usize = 6;

/// Ticks of a CPU, by column.
type Ticks = [u64; COLUMNS];

/// What a CPU did during some work.
#[derive(Clone, Debug)]
pub(super) struct Account {
    cpu: usize,
    ticks: Ticks,
}

impl Account {
    pub(super) fn new(cpu: usize) -> Self {
        Self {
            cpu,
            ticks: [0; COLUMNS],
        }
    }

    /// Does `work`, and books what the CPU did meanwhile.
    pub(super) fn book<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = read(self.cpu)?;
        let done = work()?;
        self.add(before, read(self.cpu)?);
        Ok(done)
    }

    /// The shares of a time.
    pub(super) fn shares(&self, time: f64) -> Cpu {
        let ticks = self.ticks;
        let all: u64 = ticks.iter().sum();
        let share = |columns: &[usize]| {
            let ticks: u64 = columns.iter().map(|&column| ticks[column]).sum();
            // Without a single tick nothing is known, and nothing was done.
            time * ticks as f64 / all.max(1) as f64
        };
        Cpu {
            user: share(&[USER, NICE]),
            system: share(&[SYSTEM, IRQ]),
            softirq: share(&[SOFTIRQ]),
        }
    }

    fn add(&mut self, before: Ticks, after: Ticks) {
        for (sum, (before, after)) in self.ticks.iter_mut().zip(before.into_iter().zip(after)) {
            // The kernel's idle time may go back by a tick.
            *sum += after.saturating_sub(before);
        }
    }
}

fn read(cpu: usize) -> Result<Ticks> {
    let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    parse(&text, cpu).with_context(|| format!("looking for CPU {cpu} in /proc/stat"))
}

fn parse(text: &str, cpu: usize) -> Result<Ticks> {
    let name = format!("cpu{cpu} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&name));
    let mut columns = line.context("no line of it")?.split_whitespace();
    let mut ticks = [0; COLUMNS];
    for tick in &mut ticks {
        let column = columns.next().context("too few columns")?;
        *tick = column
            .parse()
            .with_context(|| format!("{column:?} is no number of ticks"))?;
    }
    Ok(ticks)
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    const STAT: &str = "\
cpu  99 99 99 99 99 99 99 99 0 0
cpu0 10 0 0 0 0 0 0 0 0 0
cpu1 100 5 40 1000 7 2 30 1 60 0
cpu10 9 9 9 9 9 9 9 9 9 9
intr 1
";

    #[test]
    fn a_cpu_is_found_by_its_number() {
        assert_eq!(parse(STAT, 1).unwrap(), [100, 5, 40, 1000, 7, 2, 30, 1]);
        assert_eq!(parse(STAT, 10).unwrap(), [9; COLUMNS]);
        for (text, cpu) in [
            (STAT, 2),
            (STAT, 100),
            ("cpu1 1 2 3", 1),
            ("cpu1 a 0 0 0 0 0 0 0", 1),
        ] {
            assert!(parse(text, cpu).is_err(), "{cpu} in {text}");
        }
    }

    #[test]
    fn shares_are_of_all_turns_together() {
        let zero = [0; COLUMNS];
        let mut account = Account::new(0);
        account.add(zero, [3, 1, 4, 2, 0, 1, 5, 0]);
        account.add(zero, [1, 0, 0, 0, 0, 0, 3, 0]);
        // 20 ticks in all, 2 of them idle.
        let cpu = account.shares(10.0);
        assert_eq!((cpu.user, cpu.system, cpu.softirq), (2.5, 2.5, 4.0));
        let mut idle = Account::new(0);
        idle.add([0, 0, 0, 4, 0, 0, 0, 0], zero);
        assert_eq!(idle.shares(10.0), Cpu::default(), "time does not go back");
    }

    #[test]
    fn what_a_cpu_does_is_booked() {
        let mut account = Account::new(0);
        let sleep = || {
            thread::sleep(Duration::from_millis(100));
            Ok(())
        };
        account.book(sleep).unwrap();
        assert!(account.ticks.iter().sum::<u64>() > 0, "{account:?}");
        assert!(Account::new(usize::MAX).book(|| Ok(())).is_err());
    }
}
