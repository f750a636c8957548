//! How a command ends when it does not succeed.
use crate::console::{self, Style};
use std::process::ExitCode;
use transfusion::Error;
use transfusion_core as core;

/// What a command returns.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// How a command ends when it does not succeed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What is wrong, and what may help.
    Error { what: String, hint: Option<String> },
    /// The same, of arguments that do not go together.
    Usage { what: String, hint: Option<String> },
    /// The user asked to stop.
    Interrupted,
    /// Nobody reads the output any more.
    Unread,
}

impl Failure {
    /// An error without a hint.
    pub(crate) fn error(what: impl ToString) -> Failure {
        Failure::Error { what: what.to_string(), hint: None }
    }

    /// Arguments that do not go together.
    pub(crate) fn usage(what: impl ToString) -> Failure {
        Failure::Usage { what: what.to_string(), hint: None }
    }

    /// Adds what may help.
    pub(crate) fn hint(self, text: impl ToString) -> Failure {
        let hint = Some(text.to_string());
        match self {
            Failure::Error { what, .. } => Failure::Error { what, hint },
            Failure::Usage { what, .. } => Failure::Usage { what, hint },
            other => other,
        }
    }

    /// Says so on stderr; the exit code.
    pub(crate) fn report(self) -> ExitCode {
        let (what, hint, code) = match self {
            Failure::Unread => return ExitCode::SUCCESS,
            Failure::Interrupted => return ExitCode::from(130),
            Failure::Error { what, hint } => (what, hint, 1),
            Failure::Usage { what, hint } => (what, hint, 2),
        };
        console::note(format!("{} {what}", console::styled(Style::Red, "error:")));
        if let Some(hint) = hint {
            console::note(format!("{} {hint}", console::styled(Style::Bold, "hint:")));
        }
        ExitCode::from(code)
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Failure {
        match e {
            Error::Cancelled => Failure::Interrupted,
            Error::Core(e) => match hint(&e) {
                Some(hint) => Failure::error(e).hint(hint),
                None => Failure::error(e),
            },
            e => Failure::error(e),
        }
    }
}

/// What may help against an error of a device.
fn hint(e: &core::Error) -> Option<String> {
    match e {
        core::Error::NoDevice(why) => {
            let doctor = "`transfusion doctor` tells more, and --device cpu needs no GPU";
            Some(format!("{}; {doctor}", why.remedy()))
        }
        core::Error::NoKernel { .. } => Some("--device cpu runs everything".into()),
        core::Error::Memory { .. } => {
            Some("`transfusion plan` shows what takes memory; fewer rows or positions take less".into())
        }
        _ => None,
    }
}

impl From<transfusion_core::Error> for Failure {
    fn from(e: transfusion_core::Error) -> Failure {
        Error::from(e).into()
    }
}
