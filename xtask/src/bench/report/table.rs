//! What the tables have, and those on the terminal.

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};

use super::{Group, Report, words};
use crate::bench::{
    measurement::{Contender, Measurement},
    statistics::Comparison,
};

/// What a terminal shows without wrapping.
const WIDTH: u16 = 120;

const STYLE: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// A column, after the one that says what was measured.
#[derive(Clone, Copy)]
pub(super) enum Column {
    Unit,
    Values(Contender),
    /// To the stock plugins.
    Ratio(Contender),
    /// Of bpf-bridge, to the floor.
    Distance,
}

/// How much is told in a cell.
#[derive(Clone, Copy)]
pub(super) struct Detail {
    values: fn(&[f64]) -> String,
    /// Of bpf-bridge, and of its other configurations.
    ratio: fn(&Comparison) -> String,
    ratio_of_others: fn(&Comparison) -> String,
    distance: fn(&Measurement, &Comparison) -> String,
}

/// All of it: where there is room.
pub(super) const FULL: Detail = Detail {
    values: words::quartiles,
    ratio: words::ratio,
    ratio_of_others: words::ratio,
    distance: words::distance,
};

/// On a terminal: the first that fits.
const DETAILS: [Detail; 4] = {
    let most = Detail {
        values: words::spread,
        distance: words::distance_median,
        ..FULL
    };
    let medians = Detail {
        values: words::median,
        ..most
    };
    let less = Detail {
        ratio_of_others: words::ratio_median,
        ..medians
    };
    let least = Detail {
        ratio: words::ratio_median,
        ..less
    };
    [most, medians, less, least]
};

impl Group<'_> {
    /// Of those who took part; a comparison only if there is something to compare with.
    pub(super) fn columns(&self) -> Vec<Column> {
        let rows = || self.rows.iter().map(|(_, measurement)| measurement);
        let mut columns = vec![Column::Unit];
        columns.extend(self.contenders.iter().copied().map(Column::Values));
        let compared = self.contenders.iter().filter(|&&contender| {
            contender.is_ours() && rows().any(|row| row.advantage_of(contender).is_some())
        });
        columns.extend(compared.copied().map(Column::Ratio));
        if rows().any(|row| row.distance().is_some()) {
            columns.push(Column::Distance);
        }
        columns
    }
}

impl Column {
    pub(super) fn title(self, report: &Report) -> String {
        match self {
            Self::Unit => "unit".to_owned(),
            Self::Values(contender) if contender.is_ours() => contender.kind().to_owned(),
            Self::Values(contender) => report.name(contender).to_owned(),
            Self::Ratio(Contender::BpfBridge) => {
                format!("times better than {}", report.name(Contender::Stock))
            }
            Self::Ratio(contender) => {
                format!("{} to {}", contender.kind(), report.name(Contender::Stock))
            }
            Self::Distance => "to the floor".to_owned(),
        }
    }

    pub(super) fn cell(self, measurement: &Measurement, detail: Detail) -> String {
        match self {
            Self::Unit => measurement.unit.clone(),
            Self::Values(contender) => (detail.values)(measurement.values(contender)),
            Self::Ratio(contender) => {
                let found = measurement.advantage_of(contender);
                let told = match contender {
                    Contender::BpfBridge => detail.ratio,
                    _ => detail.ratio_of_others,
                };
                found.map_or_else(String::new, |found| told(&found))
            }
            Self::Distance => {
                let found = measurement.distance();
                found.map_or_else(String::new, |found| (detail.distance)(measurement, &found))
            }
        }
    }
}

impl Report {
    /// A table for each group, one of the facts, and the notes.
    pub(in crate::bench) fn table(&self) -> String {
        let groups = self.groups();
        let mut parts: Vec<String> = groups.iter().map(|group| self.group(group)).collect();
        if let Some(facts) = self.facts() {
            parts.push(format!("FACTS\n{}", facts.trim_fmt()));
        }
        if !self.found.notes.is_empty() {
            parts.push(self.found.notes.join("\n"));
        }
        parts.join("\n\n")
    }

    fn group(&self, group: &Group<'_>) -> String {
        let mut tables = DETAILS.map(|detail| self.table_of(group, detail));
        let fits = |table: &Table| {
            let mut lines = table.lines();
            lines.all(|line| line.trim_end().chars().count() <= usize::from(WIDTH))
        };
        let table = match tables.iter().find(|table| fits(table)) {
            Some(table) => table,
            None => tables[DETAILS.len() - 1]
                .set_content_arrangement(ContentArrangement::Dynamic)
                .set_width(WIDTH),
        };
        format!("{}\n{}", group.name.to_uppercase(), table.trim_fmt())
    }

    fn table_of(&self, group: &Group<'_>, detail: Detail) -> Table {
        let columns = group.columns();
        let titles = columns.iter().map(|column| two_lines(&column.title(self)));
        let rows = group.rows.iter().map(|(what, measurement)| {
            let cells = columns
                .iter()
                .map(|column| column.cell(measurement, detail));
            std::iter::once((*what).to_owned()).chain(cells).collect()
        });
        table(titles.collect(), rows.collect())
    }

    /// What is not sampled; `None` if there is nothing.
    fn facts(&self) -> Option<Table> {
        let contenders = self.fact_contenders();
        let titles = contenders.iter().map(|&contender| self.name(contender));
        let titles = std::iter::once("unit").chain(titles).map(str::to_owned);
        let rows = self.found.facts.iter().map(|fact| {
            let cells = contenders
                .iter()
                .map(|&contender| words::fact(fact, contender));
            let unit = std::iter::once(fact.unit.clone());
            let name = std::iter::once(fact.name.clone());
            name.chain(unit).chain(cells).collect()
        });
        let mut table = table(titles.collect(), rows.collect());
        table
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_width(WIDTH);
        (!contenders.is_empty()).then_some(table)
    }
}

fn table(titles: Vec<String>, rows: Vec<Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(STYLE);
    table.set_header(std::iter::once(String::new()).chain(titles));
    table.add_rows(rows);
    for (number, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 1));
        if number > 1 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// The words in two lines that are as short as may be.
fn two_lines(title: &str) -> String {
    let spaces = title.match_indices(' ').map(|(at, _)| at);
    let longer = |&at: &usize| at.max(title.len() - at);
    match spaces.min_by_key(longer) {
        Some(at) if title.len() > 9 => format!("{}\n{}", &title[..at], &title[at + 1..]),
        _ => title.to_owned(),
    }
}
